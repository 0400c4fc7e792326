"""Two callbacks for RLTrainer that keep the policy near where it was.

    RLTrainer(…, callbacks=[KLGuard(max_kl=0.01), ReferenceSync(every=400)])

KLGuard bounds how far one optimizer step may move the policy, whatever the loss; ReferenceSync
moves the reference of the KL term along, as R1-Zero did (arXiv 2501.12948).

Says what the metrics of a run mean, while it runs: RLTrainer's default callback.

Each finding of `posttrain.run.watch` is printed once when it begins to hold, by the main process. Log
lines get `warnings`, how many hold; the end of training says on how many lines each did.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from posttrain.errors import ConfigError
from posttrain.losses.kl import kl_k3
from posttrain.packed.forward import packed_logps
from posttrain.run.console import say
from posttrain.run.engine import SHARDED, whole_model
from posttrain.run.watch import Watch

MAX_HALVINGS = 5  # 1/32 of a step that is still too long is not worth taking


def guards(max_step_kl: float | None, reference_sync_steps: int) -> list[TrainerCallback]:
    """The callbacks that these two settings of a recipe ask for; None and 0 ask for none."""
    asked: list[TrainerCallback] = []
    if max_step_kl is not None:
        asked.append(KLGuard(max_step_kl))
    if reference_sync_steps:
        asked.append(ReferenceSync(reference_sync_steps))
    return asked


class KLGuard(TrainerCallback):
    """After each optimizer step, KL(before || after) as a mean over the step's tokens; a step that
    exceeds `max_kl` is halved until it does not, and undone after `MAX_HALVINGS` halvings.

    The tokens were drawn by the policy that the first update of a rollout starts from; on later
    updates the estimate (k3) is off by as much as the policy has moved since. Costs a forward a
    step and a copy of the trainable weights. The optimizer's moments keep the gradient as it was.
    Metrics: `step_kl` (nats per token, of the step as it was kept), `step_share` (1: kept whole,
    0: undone).

    max_kl: nats per token, above 0.
    """

    def __init__(self, max_kl: float) -> None:
        if not max_kl > 0:
            raise ConfigError(f"max_step_kl: expected a number above 0, found {max_kl}.")
        self.max_kl = max_kl

    def attach(self, trainer: Any) -> None:
        """Called by the trainer that this guards."""
        if trainer.accelerator.distributed_type in SHARDED:
            raise ConfigError(
                "max_step_kl: the weights are sharded by DeepSpeed or FSDP and cannot be put back. "
                "Use one process or accelerate_configs/ddp.yaml."
            )
        self.trainer = trainer
        trainer.step_logps = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.before = [weight.detach().clone() for weight in self._weights()]

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
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
        self.trainer.metrics.add("step_kl", torch.tensor(kl))
        self.trainer.metrics.add("step_share", torch.tensor(share))
        del self.before

    def _weights(self) -> list[Tensor]:
        return [weight for weight in self.trainer.model.parameters() if weight.requires_grad]

    def _move(self, steps: list[Tensor], share: float) -> None:
        for weight, old, step in zip(self._weights(), self.before, steps, strict=True):
            weight.copy_(old + share * step)

    def _kl(self) -> float:
        """Over the tokens of all ranks."""
        trainer = self.trainer
        sums = torch.zeros(2, device=trainer.args.device)
        for groups, old in trainer.step_logps:
            batch = trainer.pack(groups)
            temperature = trainer.sampling.temperature
            logps = batch.dense(
                packed_logps(trainer.model_wrapped, batch, temperature=temperature).logps
            )
            mask = batch.mask()
            sums += torch.stack((kl_k3(old, logps, mask).sum(), mask.sum()))
        if trainer.args.world_size > 1:
            dist.all_reduce(sums)
        total, count = sums.tolist()
        return total / max(count, 1)


class ReferenceSync(TrainerCallback):
    """Every so many optimizer steps the reference becomes the policy of the moment.

    Checkpoints do not hold the reference: they must fall on such steps (`save_steps` a multiple of
    `every`), where it equals the policy, so that a resumed run has the same.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ConfigError(f"reference_sync_steps: expected at least 1, found {every}.")
        self.every = every

    def attach(self, trainer: Any) -> None:
        """Called by the trainer whose reference this moves."""
        if trainer.reference is None:
            raise ConfigError(
                "reference_sync_steps: expected a reference of its own, which is there with beta "
                "above 0 and without LoRA (there it is the model without the adapter)."
            )
        args = trainer.args
        if args.save_strategy != "no" and args.save_steps % self.every:
            raise ConfigError(
                f"--save_steps {args.save_steps:g}: expected a multiple of reference_sync_steps "
                f"({self.every}), so that a resumed run has the same reference."
            )
        self.trainer = trainer

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step:  # resumed, at a step of ours
            self._sync()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self._sync()

    @torch.no_grad()
    def _sync(self) -> None:
        trainer = self.trainer
        with whole_model(trainer.accelerator, trainer.model_wrapped) as policy:
            pairs = zip(trainer.reference.parameters(), policy.parameters(), strict=True)
            for reference, weight in pairs:
                reference.copy_(weight)


class WatchCallback(TrainerCallback):
    """Watches the trainer that it is passed to; a resumed run is watched from its beginning."""

    def attach(self, trainer: Any) -> None:
        """Called by the trainer; the first of its rewards is the one that counts."""
        self.parts = list(trainer.rewards)

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.watch = Watch(self.parts)
        for line in state.log_history:
            if "loss" in line:
                self.watch.read(line)

    def on_log(
        self, _args: Any, state: Any, _control: Any, logs: dict | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        for finding in self.watch.read(logs):
            say(str(finding))
        logs["warnings"] = self.watch.num_warnings

    def on_train_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        held = [f"{name} on {n}" for name, n in self.watch.counts.items() if n]
        if state.is_world_process_zero and held:
            say(f"warnings of {len(self.watch.lines)} log lines: {', '.join(held)}")
