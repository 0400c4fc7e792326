"""The objective that an RL step minimises: a mean of a loss per token, a KL term and an entropy.

    Objective(partial(clipped_policy_loss, clip_high=0.28), per="token", beta=0.01)

    L = sum over completions i, tokens t of
        weight[i, t] * (loss[i, t] + beta * kl[i, t] - entropy_coef * entropy[i, t])

with loss f(logps, old_logps, advantages, mask) -> (B, T) of posttrain.losses, weights that make the
mean (posttrain.losses.token_weights), and kl an estimate of the KL to the reference
(posttrain.losses.kl). Log-probs are (B, T), in nats, at the sampling temperature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.losses.kl import kl_k1, kl_k3
from posttrain.losses.masking import per_token, token_weights
from posttrain.packed.batch import PackedBatch
from posttrain.packed.forward import packed_logps
from posttrain.rollouts.group import Group, advantages_of
from posttrain.rollouts.sampling import Sampling
from posttrain.trainers.base import Metrics

LOSS_INPUTS = ("logps", "old_logps", "advantages", "mask")
UNITS = ("token", "sequence", "constant")  # "group" needs whole groups, and large ones are cut

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Columns = dict[str, Tensor]  # name -> (B, T)


@dataclass(frozen=True)
class Step:
    """The state of a training step that an objective needs besides its batch.

    Attributes:
        is_first: No update has moved the policy since it sampled (or was frozen to sample).
    """

    sampling: Sampling
    metrics: Metrics
    is_first: bool


@dataclass(frozen=True)
class StepBatch:
    """A micro-batch of the current optimizer step, with its (B, T) log-probs before the step."""

    batch: PackedBatch
    logps: Tensor


class Scorer(Protocol):
    """Computes columns of whole groups before training moves the policy; RLTrainer is one."""

    model_wrapped: nn.Module
    sampling: Sampling
    metrics: Metrics

    def add_columns(
        self, groups: Sequence[Group], compute: Callable[[PackedBatch], Columns]
    ) -> None:
        """Give each group the columns that `compute` finds, in micro-batches, without gradient."""
        ...

    def policy_logps(self, batch: PackedBatch) -> Tensor:
        """(B, T) log-probs by the current policy."""
        ...

    def reference_logps(self, batch: PackedBatch) -> Tensor:
        """(B, T) log-probs by the reference."""
        ...

    def half_precision(self) -> AbstractContextManager[None]:
        """Autocast as in training."""
        ...


class RLObjective(Protocol):
    """The parts of an objective that RLTrainer calls; Objective and ppo.ActorCritic are two.

    Attributes:
        epochs: Passes over each rollout.
        uses_advantages: True where it trains on the advantages of the rollouts.
        needs_reference: True where `prepare` asks for log-probs by the reference.
        correction: Weights for completions that do not come from the current policy; None where it
            cannot train on such completions.
    """

    epochs: int
    uses_advantages: bool
    needs_reference: bool
    correction: Callable[..., Tensor] | None

    def count_items(self, groups: Sequence[Group]) -> int:
        """Count the items of these groups that the loss is a mean over."""
        ...

    def prepare(self, groups: Sequence[Group], scorer: Scorer, *, updates: int) -> None:
        """Add columns that training must not move to the groups of a rollout; a collective."""
        ...

    def microbatch_loss(
        self, model: nn.Module, batch: PackedBatch, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Return the loss summed over the batch's items, and the (B, T) log-probs it is made of."""
        ...


@dataclass(frozen=True)
class Objective:
    """A policy-gradient objective; see the module for the formula.

    Attributes:
        per: What the loss is a mean over: all tokens, completions (the mean of their means), or
            completions at a constant length (the sum of a completion's tokens divided by the
            longest length; Dr. GRPO).
        beta: Weight of the KL to the reference; 0 holds no reference.
        kl: Its estimate, kl_k2, kl_k3 or kl_k3_plus.
        entropy_coef: Weight of the entropy bonus, in advantage units per nat.
        correction: f(old_logps, sampler_logps, mask) -> (B, T) importance-sampling weights for the
            gap between sampling and training (posttrain.losses: tis_weights, …).
        off_policy_mask: f(logps, sampler_logps, advantages, mask) -> (B, T), 0 for tokens whose
            loss is dropped (posttrain.losses.off_policy_mask). Unlike `loss` it sees the log-probs
            at sampling, and old ones only where an engine did not know them.
    """

    loss: PolicyLoss
    per: Literal["token", "sequence", "constant"] = "token"
    beta: float = 0.0
    kl: Callable[..., Tensor] = kl_k3
    entropy_coef: float = 0.0
    correction: Callable[..., Tensor] | None = None
    off_policy_mask: Callable[..., Tensor] | None = None

    epochs = 1  # passes over each rollout
    uses_advantages = True

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if self.per not in UNITS:
            raise ConfigError(f"per: expected one of {', '.join(UNITS)}; found {self.per!r}.")
        if self.beta and self.kl is kl_k1:
            raise ConfigError(
                "kl: expected kl_k2, kl_k3 or kl_k3_plus in the loss, where the expected gradient "
                "of kl_k1 is 0. It belongs in the reward: reward_kl_coef instead of beta."
            )

    @property
    def needs_reference(self) -> bool:
        """True where the loss has a KL term."""
        return self.beta != 0

    def count_items(self, groups: Sequence[Group]) -> int:
        """Count what the loss is a mean over: trained tokens, or completions that have any."""
        trained = [count for group in groups for count in group.trained_tokens()]
        return sum(trained) if self.per == "token" else sum(count > 0 for count in trained)

    def prepare(self, groups: Sequence[Group], scorer: Scorer, *, updates: int) -> None:
        """Add the log-probs that training must not move to a rollout's groups; a collective.

        Args:
            updates: Optimizer steps that share the rollout. With one, the policy that starts the
                step is the policy as it is, and no pass over the data is needed.
        """
        if updates == 1 and not self.needs_reference:
            return

        def compute(batch: PackedBatch) -> Columns:
            found = {}
            if updates > 1:  # later updates start from a moved policy: keep the ratio's start
                old = scorer.policy_logps(batch)
                if batch.has_column("old_logps"):  # of tokens that an older policy sampled
                    given = batch.column("old_logps")
                    old = torch.where(given.isnan(), old, given)
                found["old_logps"] = old
            if self.needs_reference:
                found["ref_logps"] = scorer.reference_logps(batch)
            return found

        scorer.add_columns(groups, compute)

    def microbatch_loss(
        self, model: nn.Module, batch: PackedBatch, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Return the loss summed over the batch's items, and the (B, T) log-probs it is made of."""
        scores = packed_logps(
            model,
            batch,
            temperature=step.sampling.temperature,
            with_entropy=True,
            entropy_gradient=self.entropy_coef != 0,
        )
        logps, entropy = batch.dense(scores.logps), batch.dense(scores.entropy)
        mask = batch.column("trained") if batch.has_column("trained") else batch.mask()
        loss = self._corrected(logps, old_logps_of(batch, logps), mask, batch, step.metrics)
        if self.beta:
            kl = self.kl(logps, batch.column("ref_logps"), mask)
            step.metrics.add_all(mask, kl=kl)
            loss = loss + self.beta * kl
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy
        step.metrics.add_all(mask, entropy=entropy)
        if step.is_first:
            fresh = mask * batch.column("fresh") if batch.has_column("fresh") else mask
            note_first_ratio(step.metrics, logps - batch.column("policy_logps"), fresh)
        length = step.sampling.max_tokens if self.per == "constant" else None
        weights = token_weights(mask, per=self.per, total=1, length=length)
        return (loss * weights).sum(), logps

    def _corrected(
        self, logps: Tensor, old: Tensor, mask: Tensor, batch: PackedBatch, metrics: Metrics
    ) -> Tensor:
        """(B, T) loss, masked and weighted for the gap between sampling and training."""
        advantages, sampler = advantages_of(batch), batch.column("sampler_logps")
        loss = self.loss(logps, old, advantages, mask)
        if self.off_policy_mask:
            known = torch.where(sampler.isnan(), old, sampler)
            loss = loss * self.off_policy_mask(logps, known, advantages, mask)
        note_clipping(metrics, loss, logps, advantages, mask)
        note_gap(metrics, logps, batch.column("policy_logps"), mask)
        if self.correction:
            weights = self.correction(old, sampler, mask)
            note_correction(metrics, weights, old, sampler, mask)
            loss = loss * weights
        return loss


def old_logps_of(batch: PackedBatch, logps: Tensor) -> Tensor:
    """(B, T) log-probs that the ratio starts from: the batch's own where known, else `logps`."""
    if not batch.has_column("old_logps"):
        return logps.detach()
    old = batch.column("old_logps")
    return torch.where(old.isnan(), logps.detach(), old)


def check_loss(loss: PolicyLoss) -> None:
    """Raise ConfigError unless a loss can be called as f(logps, old_logps, advantages, mask)."""
    try:
        inspect.signature(loss).bind(*LOSS_INPUTS)
    except TypeError as error:
        raise ConfigError(
            f"loss {getattr(loss, '__name__', loss)}: expected f({', '.join(LOSS_INPUTS)}), all "
            f"else bound with functools.partial; found f{inspect.signature(loss)} ({error})."
        ) from None


RATIO_BAND = 0.1  # far beyond rounding in float32, and beyond most of it in bf16


def note_clipping(
    metrics: Metrics, loss: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor
) -> None:
    """Add `clip_share`: of the trained tokens with an advantage, those whose (B, T) loss has no
    gradient because a clip or a mask stops it.

    Args:
        advantages: (B,) or (B, T).
    """
    (gradient,) = torch.autograd.grad(loss.sum(), logps, retain_graph=True)
    active = mask * (per_token(advantages, mask) != 0)
    metrics.add("clip_share", (active * (gradient == 0)).sum(), active.sum())


def note_first_ratio(metrics: Metrics, gaps: Tensor, mask: Tensor) -> None:
    """Add `ratio_outside`, before the first update of a rollout: the share of tokens whose ratio of
    probabilities, in training and at sampling, differs from 1 by more than a tenth.

    A sum over a mask: picking out the known ones would make the host wait for the device.

    Args:
        gaps: (B, T) log-prob in training less log-prob at sampling, NaN where that is not known.
    """
    known = mask.bool() & ~gaps.isnan()
    outside = gaps.detach().expm1().abs() > RATIO_BAND
    metrics.add("ratio_outside", (outside & known).sum(), known.sum())


QUANTILES = {"log_rho_p1": 0.01, "log_rho_p50": 0.5, "log_rho_p99": 0.99}


def note_gap(metrics: Metrics, logps: Tensor, sampled: Tensor, mask: Tensor) -> None:
    """Add `sampler_gap`, the mean of |logps - sampled|."""
    known = mask * ~sampled.isnan()
    metrics.add("sampler_gap", (known * (logps - sampled).abs().nan_to_num()).sum(), known.sum())


def note_correction(
    metrics: Metrics, weights: Tensor, old: Tensor, sampler: Tensor, mask: Tensor
) -> None:
    """Add the correction weights' mean, quantiles of log rho = old - sampler (each micro-batch's,
    averaged by its tokens), and the share of tokens whose log-prob the sampler did not know
    (rho = 1)."""
    known = mask.bool() & ~sampler.isnan()
    log_rho = (old - sampler).detach().masked_fill(~known, torch.nan).flatten()
    shares = torch.tensor(list(QUANTILES.values()), device=mask.device, dtype=log_rho.dtype)
    quantiles = log_rho.nanquantile(shares).nan_to_num()
    for name, quantile in zip(QUANTILES, quantiles, strict=True):
        metrics.add(name, quantile * known.sum(), known.sum())
    metrics.add_all(mask, correction=weights, unknown_logps=sampler.isnan().to(mask.dtype))
