"""Train by TRPO: the optimizer step is a natural gradient step within a hard bound on the KL.

    TRPOTrainer(model, args, rollouts, TrustRegion(max_kl=0.001), tokenizer=tokenizer)

    maximise L = mean over tokens of r A   subject to   D = mean KL(pi_old || pi) <= max_kl

The mathematics is in posttrain.trainers.natural_gradient. For tiny policies and LoRA: it holds some
vectors of the size of all trained weights, and a micro-batch's logits over the whole vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from posttrain.errors import ConfigError
from posttrain.losses import reinforce_loss
from posttrain.losses.masking import per_token
from posttrain.packed.batch import PackedBatch
from posttrain.packed.forward import packed_inputs
from posttrain.rollouts.group import advantages_of
from posttrain.rollouts.source import Rollouts
from posttrain.run.engine import SHARDED
from posttrain.trainers.natural_gradient import fisher_product, line_search, natural_step
from posttrain.trainers.objective import Objective
from posttrain.trainers.rl import RLTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments


@dataclass(frozen=True)
class TrustRegion:
    """The settings of a step: its bound, and how it is computed.

    Attributes:
        max_kl: Bound on D of a step, nats per token, above 0.
        damping: Added to the diagonal of the Fisher matrix, at least 0.
        cg_iterations: Products with the Fisher matrix in a step, at least 1.
        fisher_share: The share of micro-batches, above 0 and at most 1 (at least one micro-batch),
            that these products are computed on.
        max_backtracks: How often a step may be shortened until it keeps the bound and gains.
        shrink: The factor by which it is shortened, between 0 and 1.
    """

    max_kl: float = 1e-3
    damping: float = 0.1
    cg_iterations: int = 10
    fisher_share: float = 1.0
    max_backtracks: int = 10
    shrink: float = 0.8

    def __post_init__(self) -> None:
        expected = {
            "max_kl": (self.max_kl > 0, "a number above 0"),
            "damping": (self.damping >= 0, "at least 0"),
            "cg_iterations": (self.cg_iterations >= 1, "at least 1"),
            "fisher_share": (0 < self.fisher_share <= 1, "a share above 0, at most 1"),
            "max_backtracks": (self.max_backtracks >= 1, "at least 1"),
            "shrink": (0 < self.shrink < 1, "a factor between 0 and 1"),
        }
        for name, (holds, range_) in expected.items():
            if not holds:
                raise ConfigError(f"{name}: expected {range_}, found {getattr(self, name)}.")


class TRPOTrainer(RLTrainer):
    """RLTrainer whose optimizer step is a trust-region step.

    The learning rate, its schedule, weight decay and clipping of gradients have no part in it.
    Metrics: `step_kl`, `step_gain` (of the surrogate), `step_shrunk` (times).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rollouts: Rollouts,
        region: TrustRegion,
        *,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens_per_microbatch: int | None = None,
    ) -> None:
        if args.bf16 or args.fp16:
            raise ConfigError(
                "TRPO: expected --dtype float32; conjugate gradients need its digits."
            )
        if rollouts.options.updates_per_rollout != 1:
            raise ConfigError(
                "TRPO: expected one update per rollout, for the bound is on each step's KL; found "
                f"{rollouts.options.updates_per_rollout}."
            )
        args.max_grad_norm = 0.0  # a clipped gradient would be another problem's
        super().__init__(
            model,
            args,
            rollouts,
            Objective(reinforce_loss),  # at the old policy its gradient is that of mean r A
            tokenizer=tokenizer,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
        )
        if self.accelerator.distributed_type in SHARDED:
            raise ConfigError("TRPO needs whole weights: expected one process or DDP.")
        self.region = region
        self.step_batches = []  # the surrogate and its bound are measured on the step's tokens

    def create_optimizer(self, *_: object, **__: object) -> torch.optim.Optimizer:
        """Make the optimizer whose step is `_step`."""
        self.optimizer = _TrustRegionStep(self._trained(), self._step)
        return self.optimizer

    def _trained(self) -> list[nn.Parameter]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    @torch.no_grad()
    def _step(self) -> None:
        self.model.eval()  # dropout would be noise in D, and in its bound
        region, weights = self.region, self._trained()
        gradient = torch.cat([-weight.grad.flatten() for weight in weights])
        batches = [recorded.batch for recorded in self.step_batches]
        num_fisher = max(1, round(region.fisher_share * len(batches)))
        start = torch.nn.utils.parameters_to_vector(weights)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            step = natural_step(
                self._fisher(batches[:num_fisher], start),
                gradient,
                max_kl=region.max_kl,
                damping=region.damping,
                iterations=region.cg_iterations,
            )
        found = line_search(
            self._measure(batches, start),
            step,
            max_kl=region.max_kl,
            shrink=region.shrink,
            max_tries=region.max_backtracks,
        )
        torch.nn.utils.vector_to_parameters(start + found.step, weights)
        self.metrics.add("step_kl", found.kl)
        self.metrics.add("step_gain", found.gain)
        self.metrics.add("step_shrunk", found.num_shrunk)

    def _fisher(self, batches: Sequence[PackedBatch], start: Tensor) -> Callable[[Tensor], Tensor]:
        """Return v -> F v over the tokens of these batches, of all ranks."""
        products = [
            (fisher_product(functools.partial(self._logits, batch), start), len(batch.targets))
            for batch in batches
        ]
        total = self._sum(start.new_full((), sum(n for _, n in products)))

        def product(vector: Tensor) -> Tensor:
            return self._sum(sum(f(vector) * n for f, n in products)) / total

        return product

    def _measure(
        self, batches: Sequence[PackedBatch], start: Tensor
    ) -> Callable[[Tensor], tuple[float, float]]:
        """Return f(step) -> gain in the surrogate and KL, means over the tokens of all ranks."""
        advantages = [
            per_token(advantages_of(batch), batch.mask())[batch.rows, batch.columns]
            for batch in batches
        ]

        def measure(step: Tensor) -> tuple[float, float]:
            sums = start.new_zeros(3)
            for batch, values in zip(batches, advantages, strict=True):
                old, new = (
                    self._logits(batch, theta).log_softmax(-1) for theta in (start, start + step)
                )
                kl = (old.exp() * (old - new)).sum(-1)
                moved = (new - old).gather(-1, batch.targets[:, None]).squeeze(-1)
                gain = moved.expm1() * values
                count = start.new_full((), len(kl))
                sums += torch.stack((gain.sum(), kl.sum(), count))
            gain, kl, count = self._sum(sums).tolist()
            return gain / count, kl / count

        return measure

    def _logits(self, batch: PackedBatch, theta: Tensor) -> Tensor:
        """(S, V) logits of the scored tokens with these trained weights."""
        named = [(name, w) for name, w in self.model.named_parameters() if w.requires_grad]
        parts = theta.split([w.numel() for _, w in named])
        weights = {n: part.view_as(w) for (n, w), part in zip(named, parts, strict=True)}
        inputs = {**packed_inputs(batch), "logits_to_keep": batch.predictors}
        output = torch.func.functional_call(self.model, weights, kwargs=inputs)
        return output.logits[0] / self.sampling.temperature

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks."""
        if self.args.world_size > 1:
            dist.all_reduce(values)
        return values


class _TrustRegionStep(torch.optim.Optimizer):
    """The optimizer that transformers.Trainer steps; its learning rate has no effect."""

    def __init__(self, weights: Sequence[nn.Parameter], take_step: Callable[[], None]) -> None:
        super().__init__(list(weights), {"lr": 1.0})
        self.take_step = take_step

    def step(self, closure: Callable[[], float] | None = None) -> None:  # noqa: ARG002  (torch's signature)
        self.take_step()
