"""How far the probabilities that answers were drawn with lie from the trainer's, as metrics.

Log-probs are (B, T) in nats. Those of the sampler may be NaN: unknown, and left out here.
"""

import torch
from torch import Tensor

from posttrain.trainers.metrics import Metrics

QUANTILES = {"log_rho_p1": 0.01, "log_rho_p50": 0.5, "log_rho_p99": 0.99}


def note_gap(metrics: Metrics, logps: Tensor, sampled: Tensor, mask: Tensor) -> None:
    """`sampler_gap`: the mean of |logps - sampled|."""
    known = mask * ~sampled.isnan()
    metrics.add("sampler_gap", (known * (logps - sampled).abs().nan_to_num()).sum(), known.sum())


def note_correction(
    metrics: Metrics, weights: Tensor, old: Tensor, drawn: Tensor, mask: Tensor
) -> None:
    """The weights' mean, quantiles of log rho = old - drawn (each micro-batch's, averaged by its
    tokens), and the share of tokens whose log-prob the sampler did not know (rho = 1)."""
    known = mask.bool() & ~drawn.isnan()
    log_rho = (old - drawn).detach().masked_fill(~known, torch.nan).flatten()
    shares = torch.tensor(list(QUANTILES.values()), device=mask.device, dtype=log_rho.dtype)
    quantiles = log_rho.nanquantile(shares).nan_to_num()
    for name, quantile in zip(QUANTILES, quantiles, strict=True):
        metrics.add(name, quantile * known.sum(), known.sum())
    metrics.add_all(mask, correction=weights, unknown_logps=drawn.isnan().to(mask.dtype))
