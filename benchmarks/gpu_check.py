"""What one GPU does: kernels and packed forwards against plain ones, waits, speed and memory.

    python -m benchmarks.gpu_check                              # or: make gpu-check
    python -m benchmarks.gpu_check --only kernels packed
    python -m benchmarks.gpu_check --device cpu --size tiny     # tries the script; no figures

Takes at most five minutes on one GPU such as an H200, and needs no network. Each part is a process
of its own with a time limit, so that none takes another with it. Writes
`benchmarks/gpu/<time>.json`, and prints a table of what was found beside each goal. The status is 0
if every number of the parts that judge (kernels, packed) is within its bound, and 1 if one is not
or such a part failed; goals of speed, memory and waits are reported as met or missed, and judge
nothing.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.child import Job
from benchmarks.gpu_lines import SCALES, Line
from benchmarks.harness import machine, run_child
from benchmarks.report import markdown
from benchmarks.workload import ROOT
from posttrain.errors import ConfigError, PosttrainError
from posttrain.run.options import option, parse, plain_errors, say

VERDICTS = {True: "met", False: "missed", None: ""}
LONGEST_NOTE = 120


@dataclass(frozen=True)
class Part:
    """A part of the check: its name and function, its seconds of 300, and whether it judges."""

    name: str
    function: str
    seconds: int
    judges: bool = False


PARTS = (
    Part("kernels", "benchmarks.gpu_exact:kernels", 40, judges=True),
    Part("packed", "benchmarks.gpu_exact:packed", 20, judges=True),
    Part("waits", "benchmarks.gpu_exact:waits", 25),
    Part("model", "benchmarks.gpu_speed:model", 30),
    Part("mfu", "benchmarks.gpu_speed:mfu", 30),
    Part("growth", "benchmarks.gpu_speed:growth", 45),
    Part("dpo", "benchmarks.gpu_speed:dpo_learning", 40),
    Part("grpo", "benchmarks.gpu_speed:grpo_learning", 40),
    Part("decode", "benchmarks.gpu_speed:decode", 30),
)


@dataclass(kw_only=True)
class Config:
    """Settings of the check."""

    device: Literal["cuda", "cpu"] = option("cuda", "cpu: to try the script, not for figures")
    size: Literal[tuple(SCALES)] = option("1b", "model: 1.2B or, to try the script, 1M parameters")
    only: list[str] = option([], "names of parts; none: all of them")
    seconds: float = option(300.0, "seconds that all parts may take together", above=0)
    threads: int = option(min(8, os.cpu_count() or 1), "CPU threads of a part", at_least=1)
    output: str = option("benchmarks/gpu", "folder of the JSON file")

    def check(self) -> None:
        """Raise ConfigError for parts that there are not."""
        names = [part.name for part in PARTS]
        if unknown := [name for name in self.only if name not in names]:
            raise ConfigError(f"only: expected some of {', '.join(names)}; found {unknown[0]}.")


@dataclass(frozen=True)
class Outcome:
    """What a part came to: its lines, or the error that ended it, and the seconds it took."""

    part: Part
    lines: Sequence[Line]
    error: str
    seconds: float

    @property
    def holds(self) -> bool:
        """True unless this part judges, and failed, measured nothing, or is out of a bound."""
        verdicts = [line.is_met for line in self.lines]
        return not self.part.judges or (True in verdicts and False not in verdicts)


def main(config: Config) -> bool:
    """Run the parts, write and print what they found; return whether all that judges holds."""
    described = describe_device(config.device)
    start, stamp = time.monotonic(), time.strftime("%Y%m%d-%H%M%S")
    folder, outcomes = ROOT / "gpu_check" / stamp, []
    deadline = start
    for part in (p for p in PARTS if not config.only or p.name in config.only):
        # What the parts before did not need is this one's too.
        deadline += config.seconds * part.seconds / sum(p.seconds for p in PARTS)
        outcomes.append(outcome(part, config, folder, deadline - time.monotonic()))
        state = outcomes[-1].error.partition("\n")[0] or f"{len(outcomes[-1].lines)} lines"
        say(f"{part.name:8} {outcomes[-1].seconds:5.0f} s  {state}")
    report = {
        "config": asdict(config),
        "machine": {**machine(), "device": described},
        "holds": all(found.holds for found in outcomes),
        "parts": [asdict(found) for found in outcomes],
    }
    path = Path(config.output) / f"{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1))
    say(f"\n{table(outcomes)}\n\n{described}; written to {path}")
    if not report["holds"]:
        say("what is computed does NOT hold: see the lines that are missed or failed above")
    return report["holds"]


def describe_device(device: str) -> str:
    """Return the device's name; hide GPUs from the parts where the CPU is asked for.

    Raises ConfigError where a GPU is asked for and there is none.
    """
    import torch

    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return "a CPU: a trial of the script, no figures"
    if not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: expected a GPU that torch can use, found none: nothing was checked. "
            "Try the script itself with --device cpu --size tiny."
        )
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 1e9:.0f} GB"


def outcome(part: Part, config: Config, folder: Path, seconds: float) -> Outcome:
    """Run a part in a process of its own, for at most so many seconds."""
    place = str(folder / part.name)
    job = Job(part.function, {"size": config.size}, "", "", place, "bfloat16", 1, steps=1)
    start, lines, error = time.monotonic(), [], ""
    try:
        found = run_child(job, config, seconds=seconds)
        lines = [Line(**line) for line in found]
    except PosttrainError as failure:  # whatever ended the process; the other parts go on
        error = str(failure)
    return Outcome(part, lines, error, time.monotonic() - start)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table with a row for each line, and one for each part that failed."""
    found = [("part", "what", "found", "goal", "", "note")]
    for part in outcomes:
        name = part.part.name
        found += [(name, *cells(line)) for line in part.lines]
        if part.error:
            last = part.error.strip().rpartition("\n")[2]
            found.append((name, "this part", "failed", "", "", _note(last)))
    return markdown(found)


def cells(line: Line) -> tuple[str, ...]:
    """Return a line's cells: what, found, goal, verdict, note."""
    goal = ""
    if line.goal is not None:
        goal = f"{'at most' if line.at_most else 'at least'} {_number(line.goal, line.unit)}"
    measured = "not measured" if line.found is None else _number(line.found, line.unit)
    return (line.what, measured, goal, VERDICTS[line.is_met], _note(line.note))


def _number(value: float, unit: str) -> str:
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def _note(text: str) -> str:
    return text.replace("|", "/")[:LONGEST_NOTE]


if __name__ == "__main__":
    with plain_errors():
        sys.exit(0 if main(parse(Config)) else 1)
