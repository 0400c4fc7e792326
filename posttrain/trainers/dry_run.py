"""The answer of `--dry_run`: it says what a run would do, and trains nothing.

describe(trainer)      # a line each: steps, tokens, engine, memory; the data's lines came before
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from posttrain.packed.half import half_of
from posttrain.packed.memory import Setup, memory, peak, shape_of
from posttrain.run.engine import asked_world
from posttrain.run.options import say

if TYPE_CHECKING:
    from posttrain.trainers.base import PackedTrainer

COUNTED_ROWS = 1000  # examples whose tokens are counted; the others are taken to be alike
GIB = 2**30


def describe(trainer: PackedTrainer) -> None:
    """Print steps, tokens, engine and memory of the run that `trainer` is ready for."""
    args, rows = trainer.args, len(trainer.train_dataset)
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = args.max_steps
    if steps < 0:
        steps = math.ceil(math.ceil(rows / batch) * args.num_train_epochs)
    say(f"steps   {steps:,} of {batch:,} examples; {rows:,} in the data")
    limit, one = trainer.max_tokens_per_microbatch, tokens_per_example(trainer)
    of_step, on_rank = one * batch, one * args.per_device_train_batch_size
    say(
        f"tokens  {of_step:,.0f} a step, {of_step * steps:,.0f} in all, at most {limit:,} a forward"
    )
    world = asked_world(os.environ)
    say(f"engine  {world.engine}, {world.processes} processes, on {args.device.type}")
    on_gpu, half = args.device.type == "cuda", half_of(args) is not None
    model = trainer.accelerator.unwrap_model(trainer.model)
    shape = shape_of(model.config, half=half)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    setup = Setup(
        tokens=math.ceil(min(limit, on_rank)),
        engine={"none": "DDP", "FSDP": "FSDP2"}.get(world.engine, world.engine),
        ranks=world.processes,
        trained=trained if hasattr(model, "peft_config") else None,
        checkpointing=bool(getattr(args, "activation_checkpointing", False)),
        copies=int(getattr(trainer, "reference", None) is not None),
        on_gpu=on_gpu,
    )
    parts = memory(shape, setup)
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    say(f"memory  about {peak(parts) / GIB:.2f} GiB a process ({shown})")
    say("dry run: nothing was trained and nothing written")


def tokens_per_example(trainer: PackedTrainer) -> float:
    """Return the mean packed tokens of an example; for RL the most that a completion can have."""
    rollouts = getattr(trainer, "rollouts", None)
    if rollouts is not None:
        return rollouts.longest_sequence
    data = trainer.train_dataset
    rows = range(min(COUNTED_ROWS, len(data)))
    return sum(trainer.num_tokens(data[row]) for row in rows) / len(rows)
