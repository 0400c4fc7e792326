"""Train as a recipe's settings say, from TrainingArguments to the saved model folder.

    trainer = SFTTrainer(model, training_arguments(config), documents=…, tokenizer=…)
    fit(trainer, config)

A config here is a recipe's: posttrain.run.settings.RunConfig with ModelConfig.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain import report
from posttrain.data.encode import all_ends
from posttrain.errors import ConfigError
from posttrain.run.checkpoints import (
    CheckpointCallback,
    checkpoint_to_resume,
    is_finished,
    rewind_logs,
)
from posttrain.run.engine import (
    atomic_folder,
    half_dtype,
    peak_memory_gb,
    settle_use_cpu,
    start_ranks,
)
from posttrain.run.folder import append_log, close_run, open_run, run_id
from posttrain.run.options import (
    describe_duration,
    end_soon_without_launcher,
    is_main_process,
    on_stop,
    say,
)
from posttrain.trainers.base import PackedTrainer

if TYPE_CHECKING:
    from posttrain.run.settings import RunConfig


def training_arguments(config: RunConfig) -> TrainingArguments:
    """Translate a recipe's settings into TrainingArguments for this machine.

    Checkpoints go to `<output_dir>/checkpoints`. Fields under `config.trainer` win.
    """
    settings = {
        "output_dir": str(Path(config.output_dir) / "checkpoints"),
        "seed": config.seed,
        "max_steps": config.max_steps,
        "num_train_epochs": config.num_train_epochs,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": _warmup_steps(config),
        "weight_decay": config.weight_decay,
        "adam_beta2": config.adam_beta2,
        "max_grad_norm": config.max_grad_norm,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "activation_checkpointing": config.gradient_checkpointing,
        "logging_steps": config.logging_steps,
        "eval_strategy": "steps" if config.eval_steps else "no",
        "eval_steps": config.eval_steps or None,
        "eval_on_start": bool(config.eval_steps),
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": None,  # CheckpointCallback removes old ones, after the new is whole
        "report_to": config.report_to.replace(" ", "").split(","),
        "run_name": Path(config.output_dir).name,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "use_cpu": settle_use_cpu(),
        "bf16": half_dtype(config.dtype) == torch.bfloat16,
        "fp16": half_dtype(config.dtype) == torch.float16,
        "ddp_timeout": max(1, round(config.timeout_seconds)),
    }
    start_ranks(config.timeout_seconds)
    try:
        return TrainingArguments(**{**settings, **config.trainer})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"trainer: {str(error).strip().partition(chr(10))[0]}") from error


def _warmup_steps(config: RunConfig) -> float:
    """Whole steps of a share, rounded down: rounded up, one step alone would have rate 0."""
    share, steps = config.warmup_steps, config.max_steps
    # Rounded first: 0.29 of 100 are 28.999… in binary.
    return math.floor(round(share * steps, 9)) if share < 1 and steps > 0 else share


def fit(
    trainer: PackedTrainer, config: RunConfig, *, facts: Mapping[str, object] | None = None
) -> None:
    """Take the run folder, train with progress and whole checkpoints, and save the model.

    A run that a signal stops ends with SystemExit after a checkpoint, without a model.

    Args:
        facts: what env.json holds besides, see open_run.
    """
    if config.dry_run:
        from posttrain.trainers.dry_run import describe

        return describe(trainer)
    facts = {**describe_run(trainer, config), **(facts or {})}
    folder = open_run(config.output_dir, config, resume=config.resume, facts=facts)
    run = run_id(folder)
    progress, reports = ProgressCallback(folder), ReportCallback(folder, config)
    keeping = CheckpointCallback(keep=config.save_total_limit, run=run)
    for callback in (progress, reports, StopCallback(trainer), keeping):
        trainer.add_callback(callback)
    if trainer.args.report_to:
        from posttrain.trainers.trackers import SampleTables

        trainer.add_callback(SampleTables(folder, trainer.args.report_to))
    found = checkpoint_to_resume(trainer.args.output_dir, config, run) if config.resume else None
    trainer.args.eval_on_start &= found is None  # also where a run to resume starts anew
    if found and is_finished(found, config):
        say(f"resume  {config.output_dir} has taken all its steps: nothing is left to train")
        return _end(folder, config)
    with on_stop(_request_stop(trainer)):
        try:
            with watched_ranks(trainer):
                trainer.train(resume_from_checkpoint=found)
            if not trainer.stopped_by:
                save_model(trainer, config)
        finally:
            progress.close()
            if is_main_process() and progress.metrics_path.is_file():
                reports.finish()
        if trainer.stopped_by:
            _leave(trainer, config)
    return _end(folder, config)


def _end(folder: Path, config: RunConfig) -> None:
    """Let others have the folder, and send the model to the Hub where that was asked for."""
    close_run(folder)
    if config.push_to_hub and is_main_process():
        from posttrain.run.hub import push_model

        push_model(folder / "model", config)


def describe_run(trainer: PackedTrainer, config: RunConfig) -> dict[str, object]:
    """Collect rows, rewards and the defaults that were changed, for env.json."""
    rewards = getattr(getattr(trainer, "rollouts", None), "rewards", {})
    rows = {"train": trainer.train_dataset, "held_out": trainer.eval_dataset}
    return {
        "trainer": type(trainer).__name__,
        "rows": {name: len(data) for name, data in rows.items() if data is not None},
        "rewards": {name: weight for name, (_, weight) in rewards.items()},
        "defaults": {
            field.name: field.default
            for field in fields(config)
            if field.default not in (MISSING, getattr(config, field.name))
        },
    }


class ReportCallback(TrainerCallback):
    """Has report.html made every `every` steps (0: never) and at the end, by another process.

    No step waits for it, and what fails there fails no run.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.command, self.every = [*report.COMMAND, str(folder.resolve())], config.report_steps
        self.path, self.model, self.process = folder / "report.html", folder / "model", None
        self.card = [config.hub_model_id or str(self.model), str(Path.cwd())]

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Begin a report where it is due, unless one is still being made."""
        is_due = self.every and state.global_step % self.every == 0 and is_main_process()
        if is_due and (self.process is None or self.process.poll() is not None):
            with suppress(OSError):  # the last report says why
                self.process = subprocess.Popen(self.command, **report.SETTINGS)

    def finish(self) -> None:
        """Make the last report and the card of a saved model; say where, or why there is none."""
        try:
            if self.process is not None:
                self.process.communicate(timeout=REPORT_SECONDS)
            command = [*self.command, *(self.card if self.model.is_dir() else ())]
            done = subprocess.run(command, timeout=REPORT_SECONDS, **report.SETTINGS)
            why = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
        except (OSError, subprocess.SubprocessError) as error:
            why = str(error)
        say(f"report  no {self.path}: {why}" if why else f"report  {self.path}")


def watched_ranks(trainer: PackedTrainer) -> AbstractContextManager:
    """Name a rank that does not answer, where there are several."""
    if trainer.args.world_size == 1:
        return nullcontext()
    from posttrain.run.ranks import naming_lost_ranks

    return naming_lost_ranks(lambda: trainer.state.global_step)


class StopCallback(TrainerCallback):
    """Ends training with a checkpoint, after the step at which all ranks know of a signal."""

    def __init__(self, trainer: PackedTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Ask for a save and the end, unless the run ends with this step anyway."""
        trainer = self.trainer
        can_save = state.global_step % trainer.steps_between_saves == 0
        if trainer.agreed_signal and can_save and state.global_step < state.max_steps:
            trainer.stopped_by = trainer.agreed_signal
            control.should_save = control.should_training_stop = True


REPORT_SECONDS = 60.0  # far more than a report takes
AT_ONCE_SECONDS = 2.0  # a launcher repeats a signal sooner, a person who wants to leave later


def _request_stop(trainer: PackedTrainer) -> Callable[[int, object], None]:
    """Handle signals during training: the next step is the last, a second Ctrl-C is obeyed now."""
    since = 0.0

    def handle(number: int, _frame: object) -> None:
        nonlocal since
        end_soon_without_launcher()
        if not trainer.stop_signal:
            trainer.stop_signal, since = number, time.monotonic()
            say(f"{signal.Signals(number).name}: saving after this step")
        elif number == signal.SIGINT and time.monotonic() - since > AT_ONCE_SECONDS:
            say("stopped at once; the last whole checkpoint is untouched")
            raise SystemExit(128 + number)

    return handle


def _leave(trainer: PackedTrainer, config: RunConfig) -> NoReturn:
    """End a run that was asked to stop, on every rank alike."""
    close_run(config.output_dir)
    step, number = trainer.state.global_step, trainer.stopped_by
    say(
        f"stopped by {signal.Signals(number).name} at step {step}/{trainer.state.max_steps}: "
        f"{trainer.args.output_dir}/checkpoint-{step} is saved. The same command with --resume "
        "goes on from there."
    )
    raise SystemExit(0 if config.exit_zero_on_stop else 128 + number)


def save_model(trainer: PackedTrainer, config: RunConfig) -> Path:
    """Write weights or adapter and tokenizer to `<output_dir>/model`, whole or not at all."""
    folder = Path(config.output_dir) / "model"
    trainer.check_weights()
    _list_ends(trainer)
    with atomic_folder(folder) as partial:
        trainer.save_model(str(partial))
        if is_main_process():
            if (vision := getattr(trainer.model, "vision_inputs", None)) is not None:
                vision.save(partial)
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, of no further use
    say(f"model   saved to {folder}")
    return folder


def _list_ends(trainer: PackedTrainer) -> None:
    """Let transformers' generate() stop where the model was taught to stop: turn ends count too."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if (generation := getattr(model, "generation_config", None)) is not None:
        ends = all_ends(trainer.processing_class, generation.eos_token_id)
        generation.eos_token_id = ends if len(ends) > 1 else generation.eos_token_id


# Logged key -> its text in the line. Any other key goes to metrics.jsonl alone.
SHOWN = {
    "loss": "loss {:.3f}",
    "reward": "reward {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "pair_accuracy": "pair accuracy {:.3f}",
    "label_accuracy": "label accuracy {:.3f}",
    "token_accuracy": "token accuracy {:.3f}",
    "format": "format {:.3f}",
    "margin": "margin {:.3f}",
    "mean_completion_tokens": "mean completion tokens {:.0f}",
    "kl": "kl {:.2g}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


def describe_metrics(logs: Mapping[str, float]) -> str:
    """Format the known keys in the table's order, `eval_` ones last: `loss 1.234  9 tokens/s`."""
    texts = SHOWN | {f"eval_{key}": f"eval {text}" for key, text in SHOWN.items()}
    return "  ".join(texts[key].format(logs[key]) for key in texts if key in logs)


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
            rewind_logs(self.metrics_path.parent, state.global_step)
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
        if "train_runtime" in logs and state.global_step == self._first_step:
            return  # resumed after the last step: the summary of no step
        where = {"step": state.global_step, "epoch": state.epoch}
        where["seconds"] = round(time.monotonic() - self._began, 3)
        memory = {"peak_memory_gb": round(peak_memory_gb(), 3)} if "loss" in logs else {}
        append_log(self.metrics_path, {**where, **logs, **memory})
        if not (metrics := describe_metrics(logs)):
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
