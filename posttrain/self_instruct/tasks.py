"""Tasks: an instruction with an instance, and the seed tasks that everything starts from.

seeds = load_seed_tasks("data/seed_tasks.jsonl")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain.data.read import Row, read_records
from posttrain.errors import DataError

MIN_SEEDS = 8  # as many as one request of Self-Instruct shows


@dataclass(frozen=True)
class Task:
    """An instruction with one instance; the input may be empty."""

    instruction: str
    input: str = ""
    output: str = ""
    is_classification: bool = False

    @property
    def record(self) -> dict[str, str]:
        """The columns of Alpaca's data."""
        return {"instruction": self.instruction, "input": self.input, "output": self.output}


def load_seed_tasks(path: str | Path) -> list[Task]:
    """Read tasks from rows with instruction, input, output, is_classification.

    Also Self-Instruct's own layout, whose input and output stand in a list `instances`, of which
    the first is taken. Raises DataError, naming row and field, for anything else.
    """
    seeds = [_seed(row) for row in read_records(path, split=None)]
    if len(seeds) < MIN_SEEDS:
        raise DataError(
            f"{path}: expected at least {MIN_SEEDS} seed tasks, found {len(seeds)}. Self-Instruct "
            "shows the teacher that many."
        )
    return seeds


def _seed(row: Row) -> Task:
    instances = row.values.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        values = {key: value for key, value in row.values.items() if key != "instances"}
        row = Row({**values, **instances[0]}, row.file, row.number)
    is_classification = row.values.get("is_classification", False)
    if not isinstance(is_classification, bool):
        raise row.wrong_type("is_classification", is_classification, "true or false")
    texts = {name: row.text(name).strip() for name in ("instruction", "input", "output")}
    for name in ("instruction", "output"):
        if not texts[name]:
            raise DataError(
                f"{row.where}: no '{name}'. A seed task needs instruction and output (input may "
                f"be empty); found: {', '.join(row.values)}."
            )
    return Task(**texts, is_classification=is_classification)
