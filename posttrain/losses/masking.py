"""The shapes and numerical guards that all losses share: precision, masking, safe exponentials.

Masking comes before maths because 0 * nan is nan, in the value and in the gradient: whatever stands
at a masked position must be replaced before anything is computed from it.
"""

import math

import torch
from jaxtyping import Float, Real, Shaped
from torch import Tensor

PerToken = Float[Tensor, "B T"]
Mask = Shaped[Tensor, "B T"]  # 1 or True where a token trains
PerPair = Float[Tensor, " B"]
Lengths = Real[Tensor, " B"]  # in tokens
Advantages = Float[Tensor, "B T"] | Float[Tensor, " B"]

# exp(20) is 5e8: no honest probability ratio is larger, and its square is still finite in float32.
LOG_RATIO_BOUND = 20.0


def upcast(values: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Return `values` in float32 at least: bfloat16 and float16 are raised, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def masked(values: Float[Tensor, "*B"], mask: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Return `values` in float32 at least, with 0 (and no gradient) where `mask` is 0."""
    values = upcast(values)
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def exp_bounded(log_ratio: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Compute `exp(log_ratio)`, with the exponent (and so the gradient) cut off beyond ±20 nats."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def log1mexp(logps: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Compute `log(1 - exp(logps))`, the log-probability of "not this", for `logps` <= 0.

    Exact near 0, where `log(1 - exp(x))` loses every digit; a probability of exactly 1 counts as
    1 minus one rounding step, so that the result is finite. By hand: log1mexp(-log 2) = -log 2.
    Source: M. Maechler, "Accurately computing log(1 - exp(-|a|))" (2012), Eq. 7.
    """
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return torch.where(logps > -math.log(2), (-logps.expm1()).log(), (-logps.exp()).log1p())


def log_ratio(logps: PerToken, old_logps: PerToken, mask: Mask) -> PerToken:
    """Compute log π - log π_old of each token, 0 where the mask is 0."""
    return masked(logps, mask) - masked(old_logps, mask)


def per_token(advantages: Advantages, mask: Mask) -> PerToken:
    """Return advantages of tokens, without gradient; (B,) ones are repeated for every token."""
    if advantages.ndim == 1:
        advantages = advantages.unsqueeze(1).expand(mask.shape)  # (B,) -> (B, T)
    return masked(advantages, mask).detach()


def completion_sum(values: PerToken) -> Float[Tensor, "B 1"]:
    """Sum over a completion's tokens values that are 0 where the mask is 0."""
    return values.sum(dim=1, keepdim=True)


def completion_mean(values: PerToken, mask: Mask) -> Float[Tensor, "B 1"]:
    """Average over a completion's trained tokens values that are 0 where the mask is 0."""
    return completion_sum(values) / completion_sum(mask.bool().to(values.dtype)).clamp(min=1)
