"""TRPO: RLTrainer whose optimizer step is the natural gradient step within a bound on the KL.

    TRPOTrainer(model, args, …, max_kl=0.001, advantage=leave_one_out_advantages)

    maximise L = mean over tokens of r A   subject to   D = mean KL(π_old || π) <= max_kl

The mathematics is in `posttrain.trainers.natural_gradient`. For tiny policies and LoRA: it holds some vectors of the
size of all trained weights, and the logits of a micro-batch over the whole vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from posttrain.errors import ConfigError
from posttrain.losses import reinforce_loss
from posttrain.losses.masking import per_token
from posttrain.packed.batch import PackedBatch
from posttrain.packed.forward import packed_inputs
from posttrain.run.engine import SHARDED
from posttrain.trainers.natural_gradient import fisher_product, line_search, natural_step
from posttrain.trainers.rl import RLTrainer

RANGES = {
    "max_kl": (lambda x: x > 0, "a number above 0"),
    "damping": (lambda x: x >= 0, "at least 0"),
    "cg_iterations": (lambda x: x >= 1, "at least 1"),
    "fisher_share": (lambda x: 0 < x <= 1, "a share above 0, at most 1"),
    "max_backtracks": (lambda x: x >= 1, "at least 1"),
    "shrink": (lambda x: 0 < x < 1, "a factor between 0 and 1"),
}


class TRPOTrainer(RLTrainer):
    """Adds to RLTrainer's settings:

    max_kl: bound on D of a step, nats per token. damping: added to the Fisher matrix, at least 0.
    cg_iterations: products with it in a step. fisher_share: of the micro-batches, at least one,
    that the products are computed on. max_backtracks, shrink: how often, and by what factor, the
    step is shortened until it keeps the bound and gains. The learning rate, its schedule, weight
    decay and clipping of gradients have no part in the step.

    Metrics: `step_kl`, `step_gain` (of the surrogate), `step_shrunk` (times).
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        max_kl: float = 1e-3,
        damping: float = 0.1,
        cg_iterations: int = 10,
        fisher_share: float = 1.0,
        max_backtracks: int = 10,
        shrink: float = 0.8,
        **settings: Any,
    ) -> None:
        _check(
            args, settings,
            {"max_kl": max_kl, "damping": damping, "cg_iterations": cg_iterations, "shrink": shrink,
             "fisher_share": fisher_share, "max_backtracks": max_backtracks},
        )  # fmt: skip
        args.max_grad_norm = 0.0  # a clipped gradient would be another problem's
        # At the old policy the gradient of mean r A is REINFORCE's.
        super().__init__(model, args, loss=reinforce_loss, per="token", **settings)
        if self.accelerator.distributed_type in SHARDED:
            raise ConfigError("TRPO needs whole weights: expected one process or DDP.")
        self.fisher_share = fisher_share
        self.solve = functools.partial(
            natural_step, max_kl=max_kl, damping=damping, iterations=cg_iterations
        )
        self.search = functools.partial(
            line_search, max_kl=max_kl, shrink=shrink, max_tries=max_backtracks
        )
        self.step_logps = []  # remembers the groups of the step

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        self.optimizer = _TrustRegionStep(self._trained(), self._step)
        return self.optimizer

    def _trained(self) -> list[nn.Parameter]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    @torch.no_grad()
    def _step(self) -> None:
        self.model.eval()  # dropout would be noise in D, and in its bound
        weights = self._trained()
        gradient = torch.cat([-weight.grad.flatten() for weight in weights])
        batches = [self.pack(groups) for groups, _ in self.step_logps]
        num_fisher = max(1, round(self.fisher_share * len(batches)))
        start = torch.nn.utils.parameters_to_vector(weights)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            step = self.solve(self._fisher(batches[:num_fisher], start), gradient)
        found = self.search(self._measure(batches, start), step)
        torch.nn.utils.vector_to_parameters(start + found.step, weights)
        for name, value in (
            ("step_kl", found.kl), ("step_gain", found.gain), ("step_shrunk", found.num_shrunk)
        ):  # fmt: skip
            self.metrics.add(name, torch.tensor(float(value)))

    def _fisher(self, batches: Sequence[PackedBatch], start: Tensor) -> Callable[[Tensor], Tensor]:
        """v -> F v over the tokens of these batches and of all ranks."""
        products = [
            (fisher_product(functools.partial(self._logits, batch), start), len(batch.targets))
            for batch in batches
        ]
        total = self._sum(torch.tensor(float(sum(n for _, n in products)), device=start.device))

        def product(vector: Tensor) -> Tensor:
            return self._sum(sum(f(vector) * n for f, n in products)) / total

        return product

    def _measure(
        self, batches: Sequence[PackedBatch], start: Tensor
    ) -> Callable[[Tensor], tuple[float, float]]:
        advantages = [
            per_token(self.advantages_of(batch, groups), batch.mask())[batch.rows, batch.columns]
            for batch, (groups, _) in zip(batches, self.step_logps, strict=True)
        ]

        def measure(step: Tensor) -> tuple[float, float]:
            sums = torch.zeros(3, device=start.device)
            for batch, values in zip(batches, advantages, strict=True):
                old, new = (
                    self._logits(batch, theta).log_softmax(-1) for theta in (start, start + step)
                )
                kl = (old.exp() * (old - new)).sum(-1)
                moved = (new - old).gather(-1, batch.targets[:, None]).squeeze(-1)
                gain = moved.expm1() * values
                sums += torch.stack((gain.sum(), kl.sum(), torch.tensor(float(len(kl)))))
            gain, kl, count = self._sum(sums).tolist()
            return gain / count, kl / count

        return measure

    def _logits(self, batch: PackedBatch, theta: Tensor) -> Tensor:
        """(S, V) logits of the scored tokens with these trained weights."""
        named = [(name, w) for name, w in self.model.named_parameters() if w.requires_grad]
        parts = theta.split([w.numel() for _, w in named])
        weights = {n: part.view_as(w) for (n, w), part in zip(named, parts, strict=True)}
        output = torch.func.functional_call(
            self.model,
            weights,
            kwargs={**packed_inputs(batch), "logits_to_keep": batch.predictors},
        )
        return output.logits[0] / self.sampling.temperature

    def _sum(self, values: Tensor) -> Tensor:
        """Over all ranks."""
        if self.args.world_size > 1:
            dist.all_reduce(values)
        return values


class _TrustRegionStep(torch.optim.Optimizer):
    """What transformers.Trainer steps; its learning rate only satisfies the scheduler."""

    def __init__(self, weights: Sequence[nn.Parameter], take_step: Callable[[], None]) -> None:
        super().__init__(list(weights), {"lr": 1.0})
        self.take_step = take_step

    def step(self, closure: Any = None) -> None:  # noqa: ARG002  (torch's signature)
        self.take_step()


def _check(args: Any, settings: dict[str, Any], values: dict[str, float]) -> None:
    for name, (holds, range_) in RANGES.items():
        if not holds(values[name]):
            raise ConfigError(f"{name}: expected {range_}, found {values[name]}.")
    if args.bf16 or args.fp16:
        raise ConfigError("TRPO: expected --dtype float32; conjugate gradients need its digits.")
    for name in ("beta", "entropy_coef", "correction", "off_policy_mask"):
        if settings.get(name):
            raise ConfigError(
                f"TRPO: expected no {name}; it has no part in the surrogate that a step improves."
            )
    if settings.get("updates_per_rollout", 1) != 1:
        raise ConfigError("TRPO: expected one update per rollout: the bound is on each step's KL.")
