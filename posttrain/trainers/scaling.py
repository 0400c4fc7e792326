"""Dynamic loss scaling for float16, whose gradients would underflow below 2^-24.

    trainer.add_callback(LossScaling(trainer))      # by posttrain.trainers.base, with fp16

The loss is multiplied by a scale before the backward, and the gradients are divided by it, in
float32, before their norm and the clip. A step whose gradients overflow is not taken, nor is the
schedule's; it halves the scale, and 2000 steps without one double it. accelerate and
torch.amp.GradScaler do this, and transformers keeps the scale in checkpoints. Source: Micikevicius
et al., arXiv 1710.03740 section 3.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.errors import ConfigError, NonFiniteLossError
from posttrain.run.engine import SHARDED

if TYPE_CHECKING:
    from posttrain.trainers.base import PackedTrainer

# Gradients that overflow without being multiplied come from no scale.
SMALLEST_SCALE = 1.0


class LossScaling(TrainerCallback):
    """Has a trainer scale its loss, logs `loss_scale` and `skipped_steps`, and ends a hopeless run.

    Raises ConfigError under DeepSpeed and FSDP, which scale in ways of their own.
    """

    def __init__(self, trainer: PackedTrainer) -> None:
        self.trainer, accelerator = trainer, trainer.accelerator
        if accelerator.distributed_type in SHARDED:
            raise ConfigError(
                "fp16: expected one process or DDP, found "
                f"{accelerator.distributed_type.value}. Take bf16."
            )
        if accelerator.scaler is None:  # on a CPU accelerate goes on in float32, without a word
            accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
            accelerator.native_amp = True
        self.scale = 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Read the scale that the run, perhaps a resumed one, begins with."""
        self.scale = self.trainer.accelerator.scaler.get_scale()

    def on_optimizer_step(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Note whether the step was taken, and the scale of the next one."""
        accelerator = self.trainer.accelerator
        before, self.scale = self.scale, accelerator.scaler.get_scale()
        skipped = self.scale < before
        # A fused optimizer skips inside its kernel, and accelerate takes the step for taken; the
        # schedule would go on.
        for optimizer in accelerator._optimizers:
            optimizer._is_overflow = skipped
        self.trainer.metrics.add("loss_scale", self.scale)
        self.trainer.metrics.add("skipped_steps", float(skipped))
        if skipped and self.scale < SMALLEST_SCALE:
            raise NonFiniteLossError(
                f"the gradient is not finite at step {state.global_step + 1}, whatever the loss is "
                "multiplied by; stopped. Take --dtype bfloat16 or float32, or lower "
                "--learning_rate; the last checkpoint is untouched."
            )
