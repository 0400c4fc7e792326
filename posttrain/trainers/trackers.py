"""Samples as a table in the trackers that have tables: wandb, trackio and mlflow.

    trainer.add_callback(SampleTables("runs/grpo", ["wandb"]))

The numbers go there by transformers' own callbacks; what the model wrote would not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.run.folder import read_log

ROWS = 200  # of the newest samples
COLUMNS = ("step", "prompt", "completion", "reward")


def _wandb(wandb: Any, rows: list[list]) -> None:
    wandb.log({"samples": wandb.Table(columns=[*COLUMNS], data=rows)})


def _trackio(trackio: Any, rows: list[list]) -> None:
    from pandas import DataFrame

    trackio.log({"samples": trackio.Table(dataframe=DataFrame(rows, columns=[*COLUMNS]))})


def _mlflow(mlflow: Any, rows: list[list]) -> None:
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    mlflow.log_table(columns, "samples.json")


TABLES: dict[str, Callable[[Any, list[list]], None]] = {
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


class SampleTables(TrainerCallback):
    """Sends the newest samples of a run folder as one table, after the last step."""

    def __init__(self, run_folder: str | Path, names: Sequence[str]) -> None:
        self.path = Path(run_folder) / "samples.jsonl"
        self.names = [name for name in names if name in TABLES]

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Send while the trackers are still open: their own callbacks close them at the end."""
        is_last = state.global_step >= state.max_steps and state.is_world_process_zero
        if not self.names or not is_last or not self.path.is_file():
            return
        samples = read_log(self.path)[-ROWS:]
        rows = [[sample.get(column) for column in COLUMNS] for sample in samples]
        for name in self.names if rows else ():
            TABLES[name](importlib.import_module(name), rows)
