"""Policy losses that hold the policy near the one that sampled without clipping a ratio.

Instead they test probabilities (DPPO), mask whole completions (DeepSeek-V3.2) or pull by a
quadratic term (Kimi). They are called as the losses of `policy.py` and with their conventions:
(B, T) in, a loss per token out, 0 where the mask is 0, not reduced, no gradient through
advantages.
"""

import torch

from posttrain.losses.masking import (
    Advantages,
    Mask,
    PerToken,
    completion_mean,
    completion_sum,
    exp_bounded,
    log1mexp,
    log_ratio,
    masked,
    per_token,
)


def dppo_tv_loss(
    logps: PerToken,
    old_logps: PerToken,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.15,
    clip_high: float = 0.15,
    tau: float = 0.0,
) -> PerToken:
    """Compute -r A + tau (log r)², without the first term where the token's probability has already
    moved too far in the advantage's direction: a trust region in total variation.

    Advantage units. Dropped is a token with A > 0 and π - π_old > clip_high, or A <= 0 and
    π - π_old < -clip_low; both in [0, 1] of *probability*, and at 1 nothing is dropped. `tau` >= 0
    (prime-rl: 1e-3) pulls every token back. `old_logps` are the sampling engine's in the paper.
    By hand: π_old = 0.5, π = 0.75, A = 1 cost 0, as 0.25 > 0.15.
    Source: DPPO (2602.04879), binary TV.
    """
    moved_nats = log_ratio(logps, old_logps, mask)
    advantages = per_token(advantages, mask)
    moved = masked(logps, mask).exp() - masked(old_logps, mask).exp()
    dropped = torch.where(advantages > 0, moved > clip_high, moved < -clip_low)
    surrogate = exp_bounded(moved_nats) * advantages
    return tau * moved_nats.square() - surrogate * (~dropped)


def dppo_kl_loss(
    logps: PerToken,
    old_logps: PerToken,
    advantages: Advantages,
    mask: Mask,
    *,
    max_kl: float = 0.05,
    ratio_cap: float = 20.0,
) -> PerToken:
    """Compute -sg(min(r, ratio_cap)) A log π, or 0 where the token has moved in the advantage's
    direction by more than `max_kl`: a trust region in the KL of "this token" against "any other".

    Advantage times nats. `max_kl` >= 0 in nats, KL(π_old‖π) of that two-way choice; at infinity
    nothing is dropped. By hand: π_old = 1/2, π = 3/4 is a KL of 0.144, so A = 1 costs 0 and A = -1
    costs 1.5 log(3/4) = -0.432. Source: DPPO (2602.04879), binary KL.
    """
    advantages = per_token(advantages, mask)
    moved_nats = log_ratio(logps, old_logps, mask)
    logps, old_logps = masked(logps, mask), masked(old_logps, mask)
    along = moved_nats * advantages.sign() > 0
    dropped = along & (_binary_kl(old_logps, logps) > max_kl)
    ratio = exp_bounded(moved_nats).clamp(max=ratio_cap).detach()
    return -ratio * advantages * logps * (~dropped)


def off_policy_mask(
    logps: PerToken,
    old_logps: PerToken,
    advantages: Advantages,
    mask: Mask,
    *,
    threshold: float,
) -> PerToken:
    """Return 1 for tokens that may train, 0 for bad completions that the policy has already left
    behind: A < 0 and mean_t(log π_old - log π) > `threshold`.

    A factor for any policy loss, without gradient. Take the weights from the original mask, so that
    dropped completions still count. `threshold` >= 0 in nats per token; at infinity only the mask
    is left. `old_logps` should be the sampling engine's. By hand: A = -1, π_old = 1/2, π = 1/4 is
    dropped at a threshold of 0.5, as log 2 > 0.5. Source: DeepSeek-V3.2 (2512.02556).
    """
    drift = -completion_mean(log_ratio(logps, old_logps, mask), mask)  # (B, T) -> (B, 1)
    dropped = (per_token(advantages, mask) < 0) & (drift > threshold)
    return masked(torch.ones_like(logps), mask) * (~dropped)


def kimi_policy_loss(
    logps: PerToken, old_logps: PerToken, advantages: Advantages, mask: Mask, *, tau: float = 0.1
) -> PerToken:
    """Compute -(A S - tau/2 (S - S_old)²) with S the completion's summed log-prob: online mirror
    descent.

    Reward times nats; every token of a completion carries the completion's loss, for weights per
    "sequence". A = reward - group mean (`dr_grpo_advantages`); `old_logps` are those of the
    iteration's start, at which the paper also resets the optimizer. `tau` > 0, not published, in
    reward units per nat: towards 0 plain REINFORCE, when large the policy stands still. By hand: A
    = 1, S = -2, S_old = -4, tau = 1 cost -(-2 - 2) = 4. Source: Kimi k1.5 (2501.12599) Eq. 3.
    """
    whole = completion_sum(masked(logps, mask))
    moved = completion_sum(log_ratio(logps, old_logps, mask))
    loss = tau / 2 * moved.square() - per_token(advantages, mask) * whole
    return masked(loss, mask)


def kimi_squared_loss(
    logps: PerToken, old_logps: PerToken, advantages: Advantages, mask: Mask, *, tau: float = 0.1
) -> PerToken:
    """Compute (A - tau (S - S_old))²: the same method as a regression of the log-ratio on the
    advantage.

    Squared reward units; conventions as in `kimi_policy_loss`, of whose gradient this has 2 tau
    times. A is reward - tau log Z (`log_partition_advantages`) or reward - group mean. By hand: 0
    where S - S_old = A/tau, the optimum. Source: Kimi k1.5 (2501.12599) Eq. 2.
    """
    moved = completion_sum(log_ratio(logps, old_logps, mask))
    return masked((per_token(advantages, mask) - tau * moved).square(), mask)


def kimi_token_loss(
    logps: PerToken, old_logps: PerToken, advantages: Advantages, mask: Mask, *, tau: float = 1e-3
) -> PerToken:
    """Compute -(A log π - tau/2 (log π - log π_old)²) of each token: the token form, whose scale
    does not grow with length.

    Reward times nats; for weights per "token". `tau` as in `kimi_policy_loss`, but per token
    (prime-rl: 1e-3). By hand: A = 1, log π = -2, log π_old = -4, tau = 1 cost 4; with one token per
    completion it is `kimi_policy_loss`. Source: Kimi k1.5 (2501.12599) Eq. 3, with token log-probs.
    """
    pull = tau / 2 * log_ratio(logps, old_logps, mask).square()
    return pull - per_token(advantages, mask) * masked(logps, mask)


def _binary_kl(old_logps: PerToken, logps: PerToken) -> PerToken:
    """KL between "this token or another" under the old and under the current policy."""
    other = (-old_logps.expm1()) * (log1mexp(old_logps) - log1mexp(logps))
    return old_logps.exp() * (old_logps - logps) + other
