"""Reduction of per-token numbers to one scalar: the only place where a loss is normalised.

    weights = token_weights(mask, per="token", total=tokens_in_the_optimizer_batch)
    loss = (policy_loss(...) * weights).sum()

`total` is counted over the whole accumulation window and all ranks, so that micro-batch sizes and
the number of processes change nothing. The sum over micro-batches and ranks is then the loss. But
DDP, FSDP and DeepSpeed *average* gradients over ranks: the caller multiplies its scalar by the
world size to undo that (and leaves out any division by the number of accumulation steps).
"""

import torch
from jaxtyping import Float, Real, Shaped
from torch import Tensor

from posttrain.losses.masking import masked

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
