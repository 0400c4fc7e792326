"""Measure ours and the peer on the same work, in alternation, each in a process of its own.

A benchmark is a Benchmark: how its examples are made, and for each side a function that a child
process calls. `run(config, benchmark)` measures the machine's matrix products, searches the
peer's best setting with short runs, measures all sides in rounds, refuses to report where their
first steps disagree, prints the table and writes it as JSON.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from benchmarks.child import Job
from benchmarks.flops import Work, total
from benchmarks.report import OURS, UNITS, check_agreement, section, summarise
from benchmarks.workload import ROOT, SIZES, Size, model_folder
from posttrain.errors import ConfigError, PosttrainError
from posttrain.run.options import option

PEER_USUAL, PEER_BEST = "peer_usual", "peer_best"
LEAST_ROUNDS = 3
PACKAGES = ("torch", "transformers", "trl", "accelerate")


@dataclass(kw_only=True)
class Config:
    """Settings that all comparisons share."""

    size: Literal[tuple(SIZES)] = option("small", "model: 1M, 32M, 135M, 160M or 1.2B parameters")
    data: str | None = option(None, "file of real examples; none: made up, of the same lengths")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "bfloat16 autocast or float32; auto: whose products are faster here"
    )
    threads: int = option(1, "CPU threads of each side", at_least=1)
    rounds: int = option(3, "measured runs of each side, in alternation", at_least=1)
    steps: int = option(3, "measured optimizer steps of a run, after one of warm-up", at_least=1)
    batch_size: int | None = option(None, "examples of an optimizer step", at_least=1)
    max_tokens_per_microbatch: int | None = option(
        None, "ours: packed tokens at once, which bounds memory; none: recipes' default", at_least=1
    )
    peer: bool = option(True, "measure TRL too")
    peer_usual: bool = option(True, "measure TRL with one micro-batch too, if its memory fits")
    peer_best: str | None = option(None, "TRL's best setting by its name; none: search it")
    output: str = option(str(ROOT), "folder of the results")
    seed: int = option(0, "seed of weights and examples", at_least=0)

    def check(self) -> None:
        """Raise ConfigError where the file of examples is missing."""
        if self.data is not None and not Path(self.data).is_file():
            raise ConfigError(f"data: expected a file, found none at {self.data}.")


@dataclass(frozen=True)
class Setting:
    """A way to run a side: a name for people, and the values that its function reads."""

    name: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A comparison of ours with the peer on the same examples.

    Attributes:
        make_examples: f(count, config, size, folder) -> examples in order.
        work: f(example) -> Work.
        useful_flops: f(Work, Size) -> operations.
        ours: `module:function`, a function of a Job.
        peer: Likewise.
        usual: The peer's setting for most users.
        candidates: The settings among which its best is searched.
        make_model: f(size, data, seed=) -> folder of a model, which is made if need be.
        our_values: What our side's function reads besides.
    """

    name: str
    what: str
    batch_size: int
    make_examples: Callable[[int, Config, Size, Path], list[dict]]
    work: Callable[[dict], Work]
    useful_flops: Callable[[Work, Size], int]
    ours: str
    peer: str
    usual: Setting
    candidates: Sequence[Setting]
    make_model: Callable[..., Path] = model_folder
    our_values: dict[str, Any] = field(default_factory=dict)


class ChildError(PosttrainError):
    """A measured process failed."""


def run(config: Config, benchmark: Benchmark) -> dict:
    """Measure and report; return the content of `<output>/<name>/….json`."""
    folder = Path(config.output) / benchmark.name / time.strftime("%Y%m%d-%H%M%S")
    job, examples = prepare(config, benchmark, folder)
    speed = run_child(replace(job, function="benchmarks.measure:product_rates"), config)
    rates, clock = speed["gflops"], speed["clock"]
    job = replace(job, dtype=config.dtype)
    if config.dtype == "auto":
        job = replace(job, dtype=max(rates, key=rates.get))
    say_what(benchmark, config, rates, job)

    settings, search = {OURS: our_setting(config, benchmark)}, []
    if config.peer:
        best, search = find_best(benchmark, job, config, clock)
        settings |= {PEER_USUAL: benchmark.usual} if config.peer_usual else {}
        settings |= {PEER_BEST: best}
    runs = measure_rounds(benchmark, settings, job, config)
    agreement = check_agreement(runs, dtype=job.dtype)

    work = total([benchmark.work(example) for example in examples[job.batch_size :]])
    flops = benchmark.useful_flops(work, SIZES[config.size])
    summary, module = summarise(runs), benchmark.ours.partition(":")[0]
    report = {
        "benchmark": benchmark.name,
        "what": benchmark.what,
        "config": asdict(config),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "machine": machine(),
        "dtype": job.dtype,
        "product_gflops": rates,
        "clock": clock,
        "work": {**work._asdict(), "useful_flops": flops},
        "sides": {s: o.name if s == OURS else f"TRL, {o.name}" for s, o in settings.items()},
        "search": search,
        "runs": runs,
        "agreement": agreement,
        "summary": summary,
        "shares": {
            side: flops / found[clock] / 1e9 / rates[job.dtype]
            for side, found in summary["medians"].items()
        },
    }
    write_report(report, folder)
    return report


def prepare(config: Config, benchmark: Benchmark, folder: Path) -> tuple[Job, list[dict]]:
    """Write model and examples to disk, and make a job that names them."""
    size = SIZES[config.size]
    batch_size = config.batch_size or benchmark.batch_size
    model = benchmark.make_model(size, config.data, seed=config.seed)
    examples = benchmark.make_examples((1 + config.steps) * batch_size, config, size, model)
    data = folder / "examples.json"
    folder.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(examples))
    job = Job(
        function="",
        setting={},
        model=str(model),
        data=str(data),
        folder=str(folder / "rates"),
        dtype="float32",
        batch_size=batch_size,
        steps=config.steps,
    )
    return job, examples


def our_setting(config: Config, benchmark: Benchmark) -> Setting:
    """Name our side's setting for the report."""
    most, values = config.max_tokens_per_microbatch, benchmark.our_values
    if most is None:
        return Setting("posttrain", values)
    name = f"posttrain, {most:,} tokens at once"
    return Setting(name, {**values, "max_tokens_per_microbatch": most})


def find_best(
    benchmark: Benchmark, job: Job, config: Config, clock: str
) -> tuple[Setting, list[dict]]:
    """Find the peer's fastest setting by runs of one step without warm-up, unless one is given."""
    named = {setting.name: setting for setting in benchmark.candidates}
    if config.peer_best is not None:
        if config.peer_best not in named:
            raise ConfigError(
                f"--peer_best: expected one of {'; '.join(named)}; found '{config.peer_best}'."
            )
        return named[config.peer_best], []
    place = Path(job.data).parent / "search"
    tries = {"function": benchmark.peer, "settings": [s.values for s in benchmark.candidates]}
    short = replace(job, setting=tries, folder=str(place), steps=1, warmup_steps=0)
    results = run_child(replace(short, function="benchmarks.child:one_after_the_other"), config)
    found = []
    for setting, result in zip(benchmark.candidates, results, strict=True):
        print(f"search  TRL, {setting.name}: {result[clock]:.2f} {UNITS[clock]}", flush=True)
        found.append({"setting": setting.name, clock: result[clock]})
    best = min(found, key=lambda entry: entry[clock])["setting"]
    print(f"search  TRL's best: {best}", flush=True)
    return named[best], found


def measure_rounds(
    benchmark: Benchmark, settings: dict[str, Setting], job: Job, config: Config
) -> dict[str, list[dict]]:
    """Run every side once in each round, one after the other."""
    runs: dict[str, list[dict]] = {side: [] for side in settings}
    for number in range(config.rounds):
        for side, setting in settings.items():
            function = benchmark.ours if side == OURS else benchmark.peer
            place = Path(job.data).parent / f"{side}-{number}"
            result = run_child(
                replace(job, function=function, setting=setting.values, folder=str(place)), config
            )
            runs[side].append(result)
            print(
                f"round {number + 1}  {side}: {result['cpu_seconds']:.2f} CPU s, "
                f"{result['wall_seconds']:.2f} s, {result['peak_gb']:.2f} GB",
                flush=True,
            )
    return runs


def run_child(job: Job, config: Config, *, seconds: float | None = None) -> Any:
    """Run a job in a process of its own, with the configured threads; return its result.

    Raises ChildError where it fails, and where it takes longer than `seconds`.
    """
    threads = str(config.threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    path = job.save()
    command = [sys.executable, "-m", "benchmarks.child", str(path)]
    with path.with_name("output.txt").open("w") as output:
        outputs = {"stdout": output, "stderr": subprocess.STDOUT}
        try:
            child = subprocess.run(command, env=environment, timeout=seconds, **outputs)
        except subprocess.TimeoutExpired:
            raise ChildError(f"stopped after {seconds:.0f} s; see {path.parent}") from None
    if child.returncode:
        tail = path.with_name("output.txt").read_text()[-2000:]
        raise ChildError(f"{job.function} {job.setting} failed; see {path.parent}:\n{tail}")
    return json.loads(path.with_name("result.json").read_text())


def machine() -> dict[str, str]:
    """Describe the processor, its cores, and the versions that matter."""
    from posttrain.run.engine import cpu_name  # loads torch

    return {
        "processor": cpu_name(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def say_what(benchmark: Benchmark, config: Config, rates: dict[str, float], job: Job) -> None:
    """Print what is compared, and the machine's product rates."""
    print(
        f"{benchmark.name}: {benchmark.what}\n"
        f"{config.size} model, {job.dtype}, {config.threads} threads, {config.rounds} rounds of "
        f"{config.steps} steps of {job.batch_size}, on {config.data or 'made-up examples'}\n"
        f"matrix products: float32 {rates['float32']:.1f}, bfloat16 {rates['bfloat16']:.1f} "
        "GFLOP a second (of CPU time; on a GPU, of the clock)",
        flush=True,
    )


def write_report(report: dict, folder: Path) -> None:
    """Write `<folder>.json` with everything, and `<folder>.md`, a section of RESULTS.md."""
    folder.with_suffix(".json").write_text(json.dumps(report, indent=1))
    text = section(report)
    folder.with_suffix(".md").write_text(text)
    print(f"\n{text}")
    if report["config"]["rounds"] < LEAST_ROUNDS:
        print(f"fewer than {LEAST_ROUNDS} rounds: a look, not a result")
    print(f"written to {folder}.json and {folder}.md")
