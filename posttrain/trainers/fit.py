"""Train as a recipe's settings say, from TrainingArguments to the saved model folder.

    trainer = SFTTrainer(model, training_arguments(config), documents=…, tokenizer=…)
    fit(trainer, config)

A config here is a recipe's: posttrain.run.settings.RunConfig with ModelConfig.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from posttrain.run.checkpoints import CheckpointCallback, newest_whole_checkpoint
from posttrain.run.console import is_main_process, say
from posttrain.run.engine import settle_use_cpu, uses_half
from posttrain.run.files import atomic_folder
from posttrain.run.progress import ProgressCallback
from posttrain.run.ranks import from_all_ranks
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
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "adam_beta2": config.adam_beta2,
        "max_grad_norm": config.max_grad_norm,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "activation_checkpointing": config.gradient_checkpointing,
        "logging_steps": config.logging_steps,
        "eval_strategy": "steps" if config.eval_steps else "no",
        "eval_steps": config.eval_steps or None,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": None,  # CheckpointCallback removes old ones, after the new is whole
        "report_to": config.report_to,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "use_cpu": settle_use_cpu(),
        "bf16": uses_half(config.dtype),
    }
    return TrainingArguments(**{**settings, **config.trainer})


def fit(trainer: PackedTrainer, config: RunConfig) -> None:
    """Train with progress and whole checkpoints, resuming if asked, and save the model."""
    progress = ProgressCallback(config.output_dir)
    trainer.add_callback(progress)
    if config.save_steps:
        trainer.add_callback(CheckpointCallback(keep=config.save_total_limit))
    checkpoint = None
    if config.resume:
        checkpoint = _agreed_checkpoint(trainer.args.output_dir)
        say(f"resume  {checkpoint or 'no checkpoint yet: starting anew'}")
        if checkpoint and _is_finished(checkpoint, config):
            say(f"resume  {config.output_dir} has taken all its steps: nothing is left to train")
            return
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.close()
    save_model(trainer, config)


def _agreed_checkpoint(folder: str) -> str | None:
    """The newest whole checkpoint; one rank reads the files, and all get its answer."""
    found = from_all_ranks(newest_whole_checkpoint(folder) if is_main_process() else None)[0]
    return str(found) if found else None


def _is_finished(checkpoint: str, config: RunConfig) -> bool:
    """True if the run's last step is taken and its model saved: another step would change it."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    planned = config.max_steps
    if planned < 0 and config.num_train_epochs <= state["num_train_epochs"]:
        planned = state["max_steps"]
    has_model = (Path(config.output_dir) / "model").is_dir()
    return has_model and 0 < planned <= state["global_step"]


def save_model(trainer: PackedTrainer, config: RunConfig) -> Path:
    """Write weights or adapter, tokenizer and card to `<output_dir>/model`, whole or not at all."""
    folder = Path(config.output_dir) / "model"
    with atomic_folder(folder) as partial:
        trainer.save_model(str(partial))
        if is_main_process():
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, of no further use
            (partial / "README.md").write_text(_model_card(trainer, config), encoding="utf-8")
    say(f"model   saved to {folder}")
    return folder


def _model_card(trainer: PackedTrainer, config: RunConfig) -> str:
    """A README that names the model's origin, data and command."""
    base = config.model_name_or_path
    data = getattr(config, "dataset", None)
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    return (
        f"---\nlibrary_name: transformers\nbase_model: {base}\ntags: [posttrain]\n---\n\n"
        f"# {Path(config.output_dir).name}\n\n"
        f"- base model: `{base}`\n- data: `{data}`\n"
        f"- trainer: posttrain `{type(trainer).__name__}`, {trainer.state.global_step} steps\n"
        f"- command: `{command}`\n\n"
        "All settings are in `config.yaml` of the run folder; running it again repeats the run.\n"
    )
