"""Progress of a run: a bar on a terminal, else one plain line per log step, and metrics.jsonl.

    step 20/150  loss 1.234  accuracy 0.310  kl 0.0012  12,345 tokens/s  01:12 left

`ProgressCallback` takes the place of transformers' own progress and printer callbacks (pass
`disable_tqdm=True` and remove its PrinterCallback). It writes everything that is logged, shown or
not, to metrics.jsonl with step, epoch and seconds since training began.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.run.folder import append_log, rewind_log

# Logged key -> its text in the line. Any other key goes to metrics.jsonl alone.
SHOWN = {
    "loss": "loss {:.3f}",
    "reward": "reward {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "pair_accuracy": "pair accuracy {:.3f}",
    "token_accuracy": "token accuracy {:.3f}",
    "format": "format {:.3f}",
    "margin": "margin {:.3f}",
    "mean_completion_tokens": "mean answer tokens {:.0f}",
    "kl": "kl {:.2g}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


def describe_metrics(logs: Mapping[str, float]) -> str:
    """Format the known keys in the table's order, `eval_` ones last: `loss 1.234  9 tokens/s`."""
    parts = [text.format(logs[key]) for key, text in SHOWN.items() if key in logs]
    held_out = [
        "eval " + text.format(logs[f"eval_{key}"])
        for key, text in SHOWN.items()
        if f"eval_{key}" in logs
    ]
    return "  ".join(parts + held_out)


def describe_duration(seconds: float) -> str:
    """Format a duration as `01:12`, or from an hour on as `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


class ProgressCallback(TrainerCallback):
    """Shows progress on stdout and keeps metrics.jsonl in `run_folder`, on the main process only.

    When a run is resumed, the lines of metrics.jsonl and samples.jsonl after the checkpoint's step
    are dropped, so that no step is there twice.
    """

    def __init__(self, run_folder: str | Path) -> None:
        self.metrics_path = Path(run_folder) / "metrics.jsonl"
        self.bar: Progress | None = None
        self._began, self._first_step = time.monotonic(), 0

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Drop log lines after a checkpoint's step, and draw the bar on a terminal."""
        self._began, self._first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        if state.global_step > 0:
            for name in ("metrics.jsonl", "samples.jsonl"):
                rewind_log(self.metrics_path.with_name(name), state.global_step)
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[metrics]}  {task.fields[left]}"),
                console=Console(file=sys.stdout),
            )
            self.bar.add_task("", total=state.max_steps, metrics="", left="")
            self.bar.start()
            self._advance(state)

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Move the bar."""
        self._advance(state)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        """Write the line to metrics.jsonl, and show what a person wants to see of it."""
        if not state.is_world_process_zero or not logs:
            return
        seconds = round(time.monotonic() - self._began, 3)
        where = {"step": state.global_step, "epoch": state.epoch, "seconds": seconds}
        append_log(self.metrics_path, {**where, **logs})
        metrics = describe_metrics(logs)
        if not metrics:
            return
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], metrics=metrics)
        else:
            # An evaluation outside of training has no number of steps.
            step = f"step {state.global_step}/{state.max_steps}" if state.max_steps > 0 else ""
            parts = [step, metrics, self._left(state)]
            print("  ".join(part for part in parts if part), flush=True)

    def on_train_end(self, *_: object, **__: object) -> None:
        """Give the terminal back."""
        self.close()

    def close(self) -> None:
        """Give the terminal back. Call it too when training ends by an exception."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _advance(self, state: TrainerState) -> None:
        if self.bar is not None:
            task = self.bar.task_ids[0]
            self.bar.update(task, completed=state.global_step, left=self._left(state))

    def _left(self, state: TrainerState) -> str:
        """`01:12 left`, from the mean time of a step since training began or resumed."""
        done = state.global_step - self._first_step
        to_do = state.max_steps - state.global_step
        if done <= 0 or to_do <= 0:
            return ""
        return f"{describe_duration((time.monotonic() - self._began) / done * to_do)} left"
