"""Medusa heads that learn along with a policy, from the tokens that it trains on.

    along = HeadsAlong("runs/base/model")
    RLTrainer(…, callbacks=[along])
    lookahead_of("heads", along.find)                     # and draft its next completions

The heads read the policy's last states without gradient, and have an optimizer, a norm of gradients
and a generator of random numbers of their own: the policy is the same to the bit with and without
them. Each optimizer step costs one more forward of its tokens, and the heads' own step. Medusa
(2401.10774) section 2.2.1, on completions that the policy has just sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.heads import Ahead, Heads, MedusaHeads, save_heads, saved_heads, trunk_states
from posttrain.heads.files import FOLDER, TYPES, heads_config, read_into
from posttrain.losses import medusa1_loss
from posttrain.packed.batch import PackedBatch
from posttrain.packed.forward import in_evaluation
from posttrain.run.engine import is_sharded
from posttrain.run.options import say
from posttrain.trainers.callbacks import RLView, TrainerAware

NUM_HEADS = 4
LEARNING_RATE = 1e-3  # constant: the policy goes on moving
MAX_NORM = 1.0
OPTIMIZER = "heads_optimizer.pt"  # in checkpoints


class HeadsAlong(TrainerAware):
    """Trains Medusa heads in each optimizer step, before the policy moves.

    They are those beside the starting model, or four new ones. Metrics: `accuracy_ahead_2` …, the
    shares of tokens that a head puts first, by how many places on they are.

    Args:
        source: The folder that the policy was loaded from.
    """

    def __init__(self, source: str) -> None:
        if is_sharded():
            raise ConfigError(
                "train_heads: expected one process or accelerate_configs/ddp.yaml; found DeepSpeed "
                "or FSDP."
            )
        found = heads_config(source)
        if found and found["model_type"] != TYPES["medusa"]:
            raise ConfigError(
                f"train_heads: expected Medusa heads beside {source}, or none; found "
                f"{found['model_type']}, whose place new ones would take."
            )
        self.source, self.continues = source, found is not None

    def attach(self, trainer: RLView) -> None:
        """Make the heads, and ask the trainer to record its steps."""
        super().attach(trainer)
        with torch.random.fork_rng([]):  # the policy's run draws the numbers that it would draw
            self.heads = (
                saved_heads(trainer.model, self.source)
                if self.continues
                else MedusaHeads.on(trainer.model, num_heads=NUM_HEADS)
            )
        which = f"of {self.source}" if self.continues else "new, copies of the LM head"
        say(f"heads   {self.heads.depth} Medusa heads learn along, {which}")
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), LEARNING_RATE, weight_decay=0)
        trainer.step_batches = []

    def find(self) -> Callable[[nn.Module], Heads]:
        """Return what gives the heads, which go on learning, to who generates completions."""
        return lambda model: Heads(model, self.heads)

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        """Take a step of the heads, on the states of the policy that sampled the tokens."""
        trainer = self.trainer
        batches = [recorded.batch for recorded in trainer.step_batches]
        parts = [ahead_in(batch, self.heads.depth) for batch in batches]
        counts = [[len(ahead.targets) for ahead in part] for part in parts]
        totals = torch.tensor(counts or [[0] * self.heads.depth], dtype=torch.float32).sum(0)
        totals = totals.to(trainer.args.device)
        if trainer.args.world_size > 1:
            dist.all_reduce(totals)
        weights = list(self.heads.parameters())
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        for batch, part in zip(batches, parts, strict=True):
            self._backward(batch, part, totals)
        if trainer.args.world_size > 1:
            for weight in weights:
                dist.all_reduce(weight.grad)
        nn.utils.clip_grad_norm_(weights, MAX_NORM)
        self.optimizer.step()

    def _backward(self, batch: PackedBatch, part: Sequence[Ahead], totals: Tensor) -> None:
        trainer = self.trainer
        policy = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        temperature = trainer.sampling.temperature
        with trainer.half_precision(), in_evaluation(policy):
            states = trunk_states(policy, batch)
            with torch.enable_grad():
                scores = self.heads.head_scores(states, part, temperature=temperature)
        medusa1_loss([of_head[0, :, 0] for of_head in scores], totals=totals).backward()
        for offset, of_head in enumerate(scores, start=2):
            right = of_head.detach()[0, :, 2]
            trainer.metrics.add(f"accuracy_ahead_{offset}", right.sum(), len(right))

    def save_beside(self, folder: str) -> None:
        """Write the heads, as recipes/medusa.py does."""
        save_heads(self.trainer.model, folder, self.heads)

    def save_state(self, folder: str) -> None:
        """Write the optimizer's moments."""
        torch.save(self.optimizer.state_dict(), Path(folder) / OPTIMIZER)

    def load_state(self, folder: str) -> None:
        """Read both from a checkpoint."""
        read_into(self.heads, Path(folder) / FOLDER)
        state = torch.load(Path(folder) / OPTIMIZER, weights_only=True)
        self.optimizer.load_state_dict(state)


def ahead_in(batch: PackedBatch, depth: int) -> list[Ahead]:
    """Find what Medusa heads 1 to `depth` predict: the scored tokens that follow in the same row.

    The state that predicts a completion's token t predicts token t + k by head k.
    """
    shape = (batch.num_rows, batch.num_columns + depth)
    places = batch.input_ids.new_full(shape, -1)  # of the row's tokens among the scored ones
    numbers = torch.arange(len(batch.targets), device=places.device)
    places[batch.rows, batch.columns] = numbers
    found = []
    for offset in range(1, depth + 1):
        later = places[batch.rows, batch.columns + offset]
        there = later >= 0
        found.append(Ahead(batch.predictors[there], batch.targets[later[there]]))
    return found
