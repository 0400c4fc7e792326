"""What all losses share: shapes, precision, masking, safe exponentials, and the mean over tokens.

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


UNITS = ("token", "sequence", "group", "constant")


def token_weights(
    mask: Shaped[Tensor, "B T"],
    *,
    per: str = "token",
    total: int | float | Real[Tensor, ""] | None = None,
    length: int | float | None = None,
    group_size: int | None = None,
) -> Float[Tensor, "B T"]:
    """Compute the weight of each token, such that `(loss * weights).sum()` is the mean that `per`
    names.

    | per        | weight of a trained token            | `total` counts | used by                |
    |------------|--------------------------------------|----------------|------------------------|
    | "token"    | 1 / total                            | tokens         | SFT, PPO, DAPO, CISPO  |
    | "sequence" | 1 / (tokens of its sequence * total) | sequences      | GRPO, GSPO, RLOO, Kimi |
    | "group"    | 1 / (tokens of its group * total)    | groups         | DAPO Eq. 8, literally  |
    | "constant" | 1 / (length * total)                 | sequences      | Dr. GRPO, REINFORCE    |

    No unit: a pure count. Zero where `mask` is 0. Nothing is gathered from other ranks: pass
    `total`, the count over ranks and accumulation steps, or get this batch's own. That is the
    number of trained tokens; of rows, for "sequence" and "group" without the rows or groups in
    which every token is masked (pass `total=len(mask)` to count those, as TRL does); of all rows
    for "constant".

    `length` (only "constant", tokens): one number for the whole run, such as the longest completion
    allowed, never the width of a batch; 1 gives REINFORCE's sum over a sequence's tokens.
    `group_size` (only "group"): completions per prompt; rows of a group follow each other, and a
    micro-batch holds whole groups.

    By hand: mask [[1, 1], [1, 0]] gives 1/3 each per token; [[1/4, 1/4], [1/2, 0]] per sequence.
    A batch without a trained token gets weights of 0. Raises ValueError for settings that do not
    belong to `per`.
    Source: DeepSeekMath (2402.03300) Eq. 3; DAPO (2503.14476) Eq. 8; Dr. GRPO (2503.20783) Sec. 3.
    """
    _check_settings(per, length, group_size)
    # A float64 mask gives float64 weights; a bool mask gives the default dtype.
    trained = mask.to(torch.promote_types(mask.dtype, torch.get_default_dtype()))
    tokens = trained.sum(dim=1, keepdim=True)  # (B, 1)
    if per == "token":
        return trained / _denominator(total, tokens.sum())
    if per == "constant":
        return trained / (length * (len(mask) if total is None else total))
    if per == "group":
        tokens = _group_tokens(tokens, group_size)
    occupied = (tokens > 0).sum() / (group_size or 1)
    return trained / tokens.clamp(min=1) / _denominator(total, occupied)


def _check_settings(per: str, length: int | float | None, group_size: int | None) -> None:
    if per not in UNITS:
        raise ValueError(f"per: expected one of {', '.join(UNITS)}; found {per!r}.")
    if (length is not None) != (per == "constant"):
        raise ValueError(f"length goes with per='constant' and only there; found per={per!r}.")
    if (group_size is not None) != (per == "group"):
        raise ValueError(f"group_size goes with per='group' and only there; found per={per!r}.")


def _denominator(total, own_count):
    """The global count where given, else this batch's own, or 1 where that is 0."""
    return own_count.clamp(min=1) if total is None else total


def _group_tokens(tokens: Float[Tensor, "B 1"], group_size: int) -> Float[Tensor, "B 1"]:
    """Trained tokens in the whole group of each row."""
    if tokens.shape[0] % group_size:
        raise ValueError(
            f"per='group' needs whole groups: found {tokens.shape[0]} rows, "
            f"not a multiple of group_size={group_size}."
        )
    groups = tokens.view(-1, group_size).sum(dim=1)  # (B, 1) -> (P,)
    return groups.repeat_interleave(group_size).unsqueeze(1)


def masked_sum(values: Float[Tensor, "*B"], mask: Shaped[Tensor, "*B"]) -> Float[Tensor, ""]:
    """Sum the values whose mask is not 0, in float32 at least; NaN elsewhere is left out. By hand:
    [1, 2, nan] with mask [1, 1, 0] gives 3."""
    return masked(values, mask).sum()


def masked_mean(values: Float[Tensor, "*B"], mask: Shaped[Tensor, "*B"]) -> Float[Tensor, ""]:
    """Average the values whose mask is not 0, over this tensor alone; 0 when there is none.

    For metrics. A loss goes through `token_weights`, whose denominator may span ranks and
    micro-batches. By hand: [1, 2, nan] with mask [1, 1, 0] gives 1.5.
    """
    return masked_sum(values, mask) / mask.bool().sum().clamp(min=1)
