"""What the per-token losses share: shapes, the log-ratio, advantages and means over answers."""

from jaxtyping import Float, Shaped
from torch import Tensor

from .numerics import keep

PerToken = Float[Tensor, "B T"]
Mask = Shaped[Tensor, "B T"]
Advantages = Float[Tensor, "B T"] | Float[Tensor, " B"]


def log_ratio(logps: PerToken, old_logps: PerToken, mask: Mask) -> PerToken:
    """log π - log π_old of each token, 0 where the mask is 0."""
    return keep(logps, mask) - keep(old_logps, mask)


def per_token(advantages: Advantages, mask: Mask) -> PerToken:
    """Advantages of tokens, without gradient; one per answer becomes one for each of its tokens."""
    if advantages.ndim == 1:
        advantages = advantages.unsqueeze(1).expand(mask.shape)  # (B,) -> (B, T)
    return keep(advantages, mask).detach()


def answer_sum(values: PerToken) -> Float[Tensor, "B 1"]:
    """Sum over an answer's tokens of values that are 0 where the mask is 0."""
    return values.sum(dim=1, keepdim=True)


def answer_mean(values: PerToken, mask: Mask) -> Float[Tensor, "B 1"]:
    """Mean over an answer's trained tokens of values that are 0 where the mask is 0."""
    return answer_sum(values) / answer_sum(mask.bool().to(values.dtype)).clamp(min=1)
