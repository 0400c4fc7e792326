"""Importance weights for rollouts that an engine generated with slightly other probabilities.

    loss = clipped_policy_loss(logps, old_logps, advantages, mask, ...)
    loss = loss * tis_weights(old_logps, rollout_logps, mask)

`old_logps` are the trainer's own log-probs of the sampled tokens at rollout time, `rollout_logps`
the engine's, (B, T) in nats, with temperature, top-p and top-k in both. ρ = π_old / π_rollout. The
weights carry no gradient, are 0 where the mask is 0, and are not normalised: dropped tokens stay in
the denominator. A NaN from the engine counts as ρ = 1; log ρ, and its sum over a completion, count
as ±20 nats beyond that. Where `old_logps` were never recomputed, pass `rollout_logps` to the loss
as `old_logps` and do *not* weight as well.
"""

from jaxtyping import Shaped
from torch import Tensor

from posttrain.losses.masking import Mask, PerToken, completion_sum, exp_bounded, masked


def tis_weights(
    old_logps: PerToken, rollout_logps: PerToken, mask: Mask, *, cap: float = 2.0
) -> PerToken:
    """Compute min(ρ, cap) of each token: truncated importance sampling.

    Without unit. `cap` >= 1 (published 2) trades bias for variance; 1 only ever weights down. By
    hand: π_old = 0.5, π_rollout = 0.1 give 2. Source: Yao et al., "Your efficient RL framework
    secretly brings you off-policy RL training" (2025).
    """
    ratio = exp_bounded(_log_mismatch(old_logps, rollout_logps, mask))
    return masked(ratio.clamp(max=cap), mask)


def icepop_weights(
    old_logps: PerToken,
    rollout_logps: PerToken,
    mask: Mask,
    *,
    low: float = 0.5,
    high: float = 2.0,
) -> PerToken:
    """Return ρ of each token where low <= ρ <= high, else 0: tokens that the two disagree on do not
    train.

    Without unit. 0 <= `low` <= 1 <= `high`; 0 and infinity keep every token. By hand: ρ of 0.4, 1.5
    and 5 give 0, 1.5 and 0. Source: IcePop, Ring-1T (2510.18855).
    """
    ratio = exp_bounded(_log_mismatch(old_logps, rollout_logps, mask))
    trusted = (ratio >= low) & (ratio <= high)
    return masked(ratio, mask) * trusted


def sequence_tis_weights(
    old_logps: PerToken, rollout_logps: PerToken, mask: Mask, *, cap: float = 2.0
) -> PerToken:
    """Compute min(w, cap) for every token of a completion, w the product of its ρ: unbiased but for
    the cap.

    Without unit. `cap` >= 1. By hand: token ρ of 1.5 and 1.2 give both tokens 1.8. Source: as
    `tis_weights`, with the completion as one action.
    """
    ratio = _completion_ratio(old_logps, rollout_logps, mask)
    return masked(ratio.clamp(max=cap), mask)


def sequence_mask_weights(
    old_logps: PerToken, rollout_logps: PerToken, mask: Mask, *, cap: float = 3.0
) -> PerToken:
    """Return w for every token of a completion where w <= cap, else 0: completions too unlike the
    policy's own do not train.

    Without unit. `cap` >= 1 (TRL: 3); at infinity no completion is dropped. By hand: token ρ of 1.5
    and 1.2 give both tokens 1.8, or 0 with a cap of 1.7. Source: TRL's `sequence_mask`.
    """
    ratio = _completion_ratio(old_logps, rollout_logps, mask)
    return masked(ratio, mask) * (ratio <= cap)


def fresh_tokens(
    mask: Mask, ages: Shaped[Tensor, "B T"], *, max_staleness: int = 0
) -> Shaped[Tensor, "B T"]:
    """Return the mask without tokens of policies older than `max_staleness`, for completions that
    several policies wrote (partial rollouts).

    `ages`: how many rollouts ago each token was sampled, 0 for the newest. `max_staleness` >= 0, in
    rollouts: 0 trains what is on-policy; above it, the older tokens' `old_logps` are the log-probs
    they were sampled with. By hand: ages 2, 1, 0 leave 0, 0, 1 at 0 and 0, 1, 1 at 1. Source: Kimi
    k1.5 (2501.12599), partial rollouts.
    """
    return mask * (ages <= max_staleness)


def _log_mismatch(old_logps: PerToken, rollout_logps: PerToken, mask: Mask) -> PerToken:
    """log ρ of each token without gradient; 0 where the engine gave NaN and where the mask is 0."""
    known = mask.bool() & ~rollout_logps.isnan()
    return (masked(old_logps, known) - masked(rollout_logps, known)).detach()


def _completion_ratio(old_logps: PerToken, rollout_logps: PerToken, mask: Mask) -> PerToken:
    """The product of ρ over a completion's tokens, at each of them."""
    total = completion_sum(_log_mismatch(old_logps, rollout_logps, mask))  # (B, T) -> (B, 1)
    return exp_bounded(total).expand(mask.shape)
