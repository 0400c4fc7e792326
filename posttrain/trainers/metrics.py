"""Metrics as (sum, count) on the device, reduced once per log line, and those of RL's losses.

Log-probs are (B, T) in nats. Those of the sampler may be NaN, unknown, and are left out here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.losses.masking import per_token
from posttrain.run.ranks import from_all_ranks

RATIO_BAND = 0.1  # far beyond rounding in float32, and beyond most of it in bf16


class Metrics:
    """Weighted means that cost no host synchronisation until they are read."""

    def __init__(self) -> None:
        self._totals: dict[str, list[Tensor]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Add a sum over `count` items to the mean called `name`."""
        total, count = (torch.as_tensor(x).detach() for x in (total, count))
        if name in self._totals:
            self._totals[name][0] = self._totals[name][0] + total
            self._totals[name][1] = self._totals[name][1] + count
        else:
            self._totals[name] = [total, count]

    def add_all(self, values: Tensor, **named: Tensor) -> None:
        """Add, for each name, a tensor's masked mean: `values` is the mask."""
        for name, tensor in named.items():
            self.add(name, (tensor.detach() * values).sum(), values.sum())

    def reduce(self) -> dict[str, float]:
        """Means over all ranks since the last call. A collective: every rank must call it."""
        mine = {name: (t.item(), c.item()) for name, (t, c) in self._totals.items()}
        self._totals = {}
        # Objects, not a tensor: ranks need not have met the same metrics.
        everyone = from_all_ranks(mine)
        names = sorted({name for totals in everyone for name in totals})
        means = {}
        for name in names:
            pairs = [totals[name] for totals in everyone if name in totals]
            count = sum(count for _, count in pairs)
            means[name] = sum(total for total, _ in pairs) / count if count else float("nan")
        return means


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
