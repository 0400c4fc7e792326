"""Read what a run left in its folder.

    run = read_run("runs/r1_zero")
    run.lines[-1]["loss"], run.evaluations, run.samples, run.parts

A run that is still going on is read as far as it has come.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, DataError

NEEDED = ("config.yaml", "env.json", "metrics.jsonl")
# What a record of samples.jsonl holds besides the parts of its reward.
OF_SAMPLES = {
    *("step", "prompt", "completion", "reward", "tokens", "finish_reason"),
    *("parts", "rules", "token_logps", "chosen", "log_ratio"),
    *("margin", "before", "pair"),
}


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        lines: Log lines of training, by step.
        evaluations: Log lines of evaluations; their metrics begin with `eval_`.
        samples: Records of samples.jsonl; none for runs that generate nothing.
        parts: Names of the rewards, the main one first; none where nothing was rewarded.
        is_finished: True once the model is saved.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    parts: tuple[str, ...]
    is_finished: bool

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def last_step(self) -> int:
        """The newest step that was logged; 0 before the first."""
        return max((line["step"] for line in self.lines + self.evaluations), default=0)

    @property
    def seconds(self) -> float:
        """Seconds of training up to the newest log line; each resumption counts from 0 again."""
        times = [line.get("seconds") or 0.0 for line in self.lines]
        ends = [a for a, b in pairwise(times) if b < a]
        return sum(ends) + (times[-1] if times else 0.0)


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        ConfigError: It is no run folder, or nothing has been logged yet.
        DataError: A file of it is damaged.
    """
    folder = Path(folder)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"report: expected a run folder with {', '.join(NEEDED)}, found '{folder}' without "
            f"{', '.join(missing)}. Name the --output_dir of a run that has logged a line."
        )
    import yaml

    with (folder / "config.yaml").open(encoding="utf-8") as file:
        config = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    environment = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    records = read_records(folder / "metrics.jsonl")
    samples = folder / "samples.jsonl"
    found = read_records(samples) if samples.is_file() else []
    return Run(
        folder=folder,
        config=config,
        environment=environment,
        lines=[record for record in records if "loss" in record],
        evaluations=[r for r in records if any(key.startswith("eval_") for key in r)],
        samples=found,
        parts=_parts(environment, found),
        is_finished=(folder / "model").is_dir(),
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, without a last one that is being written.

    Raises:
        DataError: A line is no record.
    """
    records = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}, row {number}: expected a record in JSON, found "
                    f"{line.strip()[:40]!r}. Remove the line."
                )
            records.append(record)
    return records


def _parts(environment: dict[str, Any], samples: list[dict[str, Any]]) -> tuple[str, ...]:
    """The rewards by env.json, or what a run of before it named them holds in its samples."""
    if "rewards" in environment:
        return tuple(environment["rewards"])
    return tuple(name for name in samples[0] if name not in OF_SAMPLES) if samples else ()
