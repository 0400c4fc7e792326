"""Callbacks of RLTrainer: they bound its steps, move its reference and watch its metrics.

    RLTrainer(…, callbacks=[KLGuard(max_kl=0.01), ReferenceSync(every=400)])

KLGuard bounds how far one optimizer step may move the policy, whatever the loss; ReferenceSync
moves the reference of the KL term along, as R1-Zero did (arXiv 2501.12948); OptimizerReset starts
Adam's moments anew, as Kimi k1.5 does (2501.12599). What every run watches is in
posttrain.trainers.rl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from posttrain.errors import ConfigError
from posttrain.losses.kl import kl_k3
from posttrain.packed.forward import packed_logps
from posttrain.rollouts.policies import TrainerView, whole_model
from posttrain.rollouts.sampling import Sampling
from posttrain.run.engine import SHARDED
from posttrain.trainers.objective import StepBatch

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

MAX_HALVINGS = 5  # 1/32 of a step that is still too long is not worth taking


def guards(max_step_kl: float | None, reference_sync_steps: int) -> list[TrainerCallback]:
    """Return the callbacks that two settings of a recipe ask for; None and 0 ask for none."""
    asked: list[TrainerCallback] = []
    if max_step_kl is not None:
        asked.append(KLGuard(max_step_kl))
    if reference_sync_steps:
        asked.append(ReferenceSync(reference_sync_steps))
    return asked


class RLView(TrainerView, Protocol):
    """The attributes of RLTrainer that these callbacks read, and the one that they set."""

    sampling: Sampling
    step_batches: list[StepBatch] | None


class TrainerAware(TrainerCallback):
    """A callback that reads the RLTrainer that it is passed to."""

    def attach(self, trainer: RLView) -> None:
        """Remember the trainer, and check its settings; the trainer calls this once."""
        self.trainer = trainer

    def save_beside(self, folder: str) -> None:
        """Write what belongs beside a model that is being saved; nothing here."""

    def save_state(self, folder: str) -> None:
        """Write what a resumed run needs, into a checkpoint; nothing here."""

    def load_state(self, folder: str) -> None:
        """Take up what both wrote."""


class KLGuard(TrainerAware):
    """Keeps KL(before || after) of each optimizer step within a bound, as a mean over its tokens.

    A step that exceeds `max_kl` is halved until it does not, and undone after `MAX_HALVINGS`
    halvings. The tokens come from the policy that the first update of a rollout starts from; on
    later updates the estimate (k3) is off by as much as the policy has moved since. Costs a forward
    a step and a copy of the trainable weights. The optimizer's moments keep the gradient as it was.
    Metrics: `step_kl` (nats per token, of the step as it was kept), `step_share` (1: kept whole,
    0: undone).

    Args:
        max_kl: Nats per token, above 0.
    """

    def __init__(self, max_kl: float) -> None:
        if not max_kl > 0:
            raise ConfigError(f"max_step_kl: expected a number above 0, found {max_kl}.")
        self.max_kl = max_kl

    def attach(self, trainer: RLView) -> None:
        """Ask the trainer to record its steps; ConfigError where the weights are sharded."""
        super().attach(trainer)
        if trainer.accelerator.distributed_type in SHARDED:
            raise ConfigError(
                "max_step_kl: the weights are sharded by DeepSpeed or FSDP and cannot be put back. "
                "Use one process or accelerate_configs/ddp.yaml."
            )
        trainer.step_batches = []

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        """Copy the weights."""
        self.before = [weight.detach().clone() for weight in self._weights()]

    @torch.no_grad()
    def on_optimizer_step(self, *_: object, **__: object) -> None:
        """Measure the step, and shorten it."""
        steps = [w - old for w, old in zip(self._weights(), self.before, strict=True)]
        kl, share = self._kl(), 1.0
        for _halving in range(MAX_HALVINGS):
            if kl <= self.max_kl:
                break
            share /= 2
            self._move(steps, share)
            kl = self._kl()
        if kl > self.max_kl:
            share, kl = 0.0, 0.0
            self._move(steps, share)
        self.trainer.metrics.add("step_kl", kl)
        self.trainer.metrics.add("step_share", share)
        del self.before

    def _weights(self) -> list[Tensor]:
        return [weight for weight in self.trainer.model.parameters() if weight.requires_grad]

    def _move(self, steps: list[Tensor], share: float) -> None:
        for weight, old, step in zip(self._weights(), self.before, steps, strict=True):
            weight.copy_(old + share * step)

    def _kl(self) -> float:
        """Compute the mean over the tokens of all ranks, in nats, of the step as it is now."""
        trainer = self.trainer
        sums = torch.zeros(2, device=trainer.args.device)
        temperature = trainer.sampling.temperature
        for recorded in trainer.step_batches:
            batch, mask = recorded.batch, recorded.batch.mask()
            scores = packed_logps(trainer.model_wrapped, batch, temperature=temperature)
            kl = kl_k3(recorded.logps, batch.dense(scores.logps), mask)
            sums += torch.stack((kl.sum(), mask.sum()))
        if trainer.args.world_size > 1:
            dist.all_reduce(sums)
        total, count = sums.tolist()
        return total / max(count, 1)


class ReferenceSync(TrainerAware):
    """Makes the reference a copy of the policy every `every` optimizer steps.

    Checkpoints do not hold the reference: they must fall on such steps (`save_steps` a multiple of
    `every`), where it equals the policy, so that a resumed run has the same.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ConfigError(f"reference_sync_steps: expected at least 1, found {every}.")
        self.every = every

    def attach(self, trainer: RLView) -> None:
        """Check that there is a reference to move, and that checkpoints fall on such steps."""
        super().attach(trainer)
        if trainer.reference is None:
            raise ConfigError(
                "reference_sync_steps: expected a separate reference, which exists with beta "
                "above 0 and without LoRA (there it is the model without the adapter)."
            )
        args = trainer.args
        if args.save_strategy != "no" and args.save_steps % self.every:
            raise ConfigError(
                f"--save_steps {args.save_steps:g}: expected a multiple of reference_sync_steps "
                f"({self.every}), so that a resumed run has the same reference."
            )

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Take over the weights of a resumed run, which stopped on such a step."""
        if state.global_step:
            self._sync()

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Move the reference where it is due."""
        if state.global_step % self.every == 0:
            self._sync()

    @torch.no_grad()
    def _sync(self) -> None:
        trainer = self.trainer
        with whole_model(trainer.accelerator, trainer.model_wrapped) as policy:
            pairs = zip(trainer.reference.parameters(), policy.parameters(), strict=True)
            for reference, weight in pairs:
                reference.copy_(weight)


class OptimizerReset(TrainerCallback):
    """Empties the optimizer's state before every `every`-th step: Adam's moments start anew.

    In Kimi k1.5 each iteration is a new problem, with a reference of its own, so `every` is the
    updates per rollout. The schedule of the learning rate goes on.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ConfigError(f"optimizer reset: expected at least 1 step, found {every}.")
        self.every = every

    def on_step_begin(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **_: object,
    ) -> None:
        """Empty the state where it is due."""
        if state.global_step % self.every == 0:
            while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
                optimizer = optimizer.optimizer
            optimizer.state.clear()
