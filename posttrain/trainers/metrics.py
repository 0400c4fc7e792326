"""Metrics as (sum, count) on the device, reduced once per log line."""

import torch
from torch import Tensor

from posttrain.losses.tokens import per_token
from posttrain.ranks import from_all_ranks

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
    """`clip_share`, of trained tokens with an advantage: those whose (B, T) loss has no gradient,
    because a clip or a mask stops it. advantages: (B,) or (B, T)."""
    (gradient,) = torch.autograd.grad(loss.sum(), logps, retain_graph=True)
    active = mask * (per_token(advantages, mask) != 0)
    metrics.add("clip_share", (active * (gradient == 0)).sum(), active.sum())


def note_first_ratio(metrics: Metrics, gaps: Tensor, mask: Tensor) -> None:
    """`ratio_outside`, before the first update of a rollout: the share of tokens whose ratio of
    probabilities, in training and when drawn, is off 1 by more than a tenth.

    gaps: (B, T) log-prob in training less log-prob when drawn, NaN where that is not known. A sum
    over a mask: to pick the known ones out would make the host wait for the device.
    """
    known = mask.bool() & ~gaps.isnan()
    outside = gaps.detach().expm1().abs() > RATIO_BAND
    metrics.add("ratio_outside", (outside & known).sum(), known.sum())
