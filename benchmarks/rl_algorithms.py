"""Compare all RL algorithms from one SFT checkpoint: held-out accuracy before and after, by seed.

    python -m benchmarks.rl_algorithms                                   all, three seeds
    python -m benchmarks.rl_algorithms --algorithms grpo ppo --seeds 1 --max_steps 8
    python -m benchmarks.rl_algorithms --processes 2 --write_docs

Runs the recipes with the settings of the table below, each (algorithm, seed) in a process of its
own on one thread, and evaluates the saved models with one completion per held-out problem, at
temperature 0.6. Finished runs are kept in `--output_dir` and not run again. The start is the
default SFT model: its format is always right and its reasoning mostly too short, so about 30 % of
its completions are right and there is room for 20 points more. It writes results.json, table.md and
curves.svg; with --write_docs the table goes into docs/rl_comparison.md and the curves
to docs/rl_curves.svg.
"""

import importlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from common import REWARD_MODEL, SFT_MODEL, make_missing

from benchmarks.rl_curves import curves
from posttrain.errors import ConfigError
from posttrain.run.folder import write_whole
from posttrain.run.options import option, parse, plain_errors, say
from recipes import grpo

HELD_OUT, TEMPLATE, MAX_TOKENS, TEMPERATURE = "data/heldout.jsonl", "alpaca", 64, 0.6
DOCUMENT, PICTURE = Path("docs/rl_comparison.md"), Path("docs/rl_curves.svg")
MARK = "<!-- rl_algorithms -->"

# Recipe, and its settings where they are not its defaults. The budget is 24 steps of 128
# completions, two steps to a rollout so that ratios and clips matter; PPO and TRPO sample fewer.
GRPO = {"max_steps": 24, "per_device_train_batch_size": 128, "updates_per_rollout": 2}
RUNS = {
    **{name: ("grpo", {**GRPO, "algorithm": name}) for name in get_args(grpo.Name)},
    "ppo": ("ppo", {"max_steps": 60}),
    "trpo": ("trpo", {"max_steps": 10}),
    "kimi_k15": ("kimi_k15", {"max_steps": 24}),
}


@dataclass(kw_only=True)
class Config:
    """Settings of the benchmark of RL algorithms."""

    algorithms: list[str] | None = option(None, f"of {', '.join(RUNS)}; none: all")
    seeds: int = option(3, "seeds 0, 1, …", at_least=1)
    processes: int = option(1, "runs at the same time, a thread each", at_least=1)
    max_steps: int | None = option(None, "optimizer steps; none: as in the table", at_least=1)
    output_dir: str = option("runs/benchmarks/rl_algorithms", "folder of runs and results")
    write_docs: bool = option(False, "put table and curves into docs/")
    run: str | None = option(None, "run this algorithm alone, in this process, with --seed")
    seed: int = option(0, "seed of --run", at_least=0)

    def check(self) -> None:
        """Raise ConfigError for an algorithm that is not in the table."""
        for name in [*(self.algorithms or []), *([self.run] if self.run else [])]:
            if name not in RUNS:
                raise ConfigError(f"algorithms: expected some of {', '.join(RUNS)}; found {name}.")


def main(config: Config) -> None:
    """Run what is missing, and report; with --run, run one algorithm in this process."""
    if config.run:
        run_one(config)
        return
    names = [name for name in config.algorithms or RUNS if is_there(name)]
    make_missing(SFT_MODEL)
    if "ppo" in names:
        make_missing(REWARD_MODEL)
    before = judged_once(Path(config.output_dir) / "start.json", SFT_MODEL)
    jobs = [(name, seed) for name in names for seed in range(config.seeds)]
    missing = [job for job in jobs if not result_path(config, *job).is_file()]
    say(f"start {before:.1%} right; {len(jobs)} runs, {len(missing)} of them to do")
    with ThreadPoolExecutor(config.processes) as pool:
        for (name, seed), code in zip(
            missing, pool.map(lambda job: start(config, *job), missing), strict=True
        ):
            say(f"{name}, seed {seed}: {'done' if not code else 'failed, see its log'}")
    report(config, before, [job for job in jobs if result_path(config, *job).is_file()])


def is_there(name: str) -> bool:
    """True where the algorithm's recipe exists."""
    return importlib.util.find_spec(f"recipes.{RUNS[name][0]}") is not None


def result_path(config: Config, name: str, seed: int) -> Path:
    """Return the path of the result of a run."""
    return Path(config.output_dir) / f"{name}-{seed}.json"


def start(config: Config, name: str, seed: int) -> int:
    """Run one algorithm in a process of its own, and return its exit code."""
    flags = ["--run", name, "--seed", str(seed), "--output_dir", config.output_dir]
    flags += ["--max_steps", str(config.max_steps)] if config.max_steps else []
    path = result_path(config, name, seed).with_suffix(".log")
    with path.open("w") as log:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.rl_algorithms", *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).returncode


def run_one(config: Config) -> None:
    """Train, evaluate, and write the result, which marks the run as done."""
    recipe_name, settings = RUNS[config.run]
    recipe = importlib.import_module(f"recipes.{recipe_name}")
    path = result_path(config, config.run, config.seed)
    folder = path.with_suffix("")
    steps = {"max_steps": config.max_steps} if config.max_steps else {}
    named = {
        "template": TEMPLATE,
        "model_name_or_path": SFT_MODEL,
        "seed": config.seed,
        "output_dir": str(folder),
        "logging_steps": 2,
        **settings,
        **steps,
    }
    known = {field.name for field in fields(recipe.Config)}
    trainer = recipe.main(recipe.Config(**{k: v for k, v in named.items() if k in known}))
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_json(
        path,
        {
            "algorithm": config.run,
            "seed": config.seed,
            "accuracy": accuracy(f"{folder}/model"),
            "steps": trainer.state.global_step,
            "learning_rate": trainer.args.learning_rate,
            "cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in usage)),
            "curve": [(line["step"], line["accuracy"]) for line in lines if "accuracy" in line],
        },
    )


def accuracy(model: str) -> float:
    """Evaluate a model on the held-out problems."""
    from posttrain.commands.evaluate import evaluate_model
    from posttrain.rewards.math import math_reward

    return evaluate_model(
        model,
        HELD_OUT,
        rewards={"accuracy": (math_reward, 1.0)},
        template=TEMPLATE,
        max_tokens=MAX_TOKENS,
        temperature=TEMPERATURE,
    )["accuracy"]


def judged_once(path: Path, model: str) -> float:
    """Read the accuracy of a model from `path`, or evaluate it and write it there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, accuracy(model))
    return json.loads(path.read_text())


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, json.dumps(content) + "\n")


def report(config: Config, before: float, jobs: list[tuple[str, int]]) -> None:
    """Write results.json, table.md and curves.svg, and print the table."""
    results: dict[str, list[dict]] = {}
    for name, seed in jobs:
        found = json.loads(result_path(config, name, seed).read_text())
        results.setdefault(name, []).append(found)
    folder = Path(config.output_dir)
    write_json(folder / "results.json", {"before": before, "runs": results})
    text, picture = table(before, results), curves(before, results)
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "curves.svg").write_text(picture, encoding="utf-8")
    say(text)
    if config.write_docs:
        head, _, tail = DOCUMENT.read_text(encoding="utf-8").split(MARK)
        DOCUMENT.write_text(f"{head}{MARK}\n{text}{MARK}{tail}", encoding="utf-8")
        PICTURE.write_text(picture, encoding="utf-8")


def table(before: float, results: Mapping[str, list[dict]]) -> str:
    """Format a Markdown table with a row for each algorithm, the best first."""
    rows = []
    for name, runs in results.items():
        after = [run["accuracy"] for run in runs]
        mean = sum(after) / len(after)
        each = ", ".join(f"{100 * x:.1f}" for x in after)
        seconds = sum(run["cpu_seconds"] for run in runs) / len(runs)
        row = (
            f"| `{name}` | {100 * mean:.1f} | {100 * (mean - before):+.1f} | {each} | "
            f"{runs[0]['steps']} | {seconds:.0f} |"
        )
        rows.append((mean, row))
    rows.sort(reverse=True)
    head = (
        f"| algorithm | % right, from {100 * before:.1f} | points | seeds | steps | CPU seconds |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *(row for _, row in rows), ""])


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
