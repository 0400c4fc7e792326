"""Policy-gradient losses per token, from REINFORCE to GRPO, GSPO and CISPO.

    loss = (clipped_policy_loss(logps, old_logps, advantages, mask) * token_weights(mask)).sum()

All take the log-probs of sampled tokens under the policy (`logps`) and under the policy that
sampled them (`old_logps`), (B, T) in nats, at the temperature of sampling; advantages, (B, T) or
one per completion; and the mask of tokens that train. They return a loss per token, 0 where the
mask is 0: what stands there in the inputs, NaN included, reaches neither value nor gradient.
Nothing is reduced: normalisation is `token_weights`'s. Advantages carry no gradient. In the
formulas r = π/π_old of a token, A its advantage; log-ratios count as ±20 nats beyond that. The
algorithms are combinations:

| algorithm | advantage                  | loss                                  | weights per |
|-----------|----------------------------|---------------------------------------|-------------|
| PPO       | gae                        | clipped_policy_loss                   | token       |
| REINFORCE | leave_one_out_advantages   | reinforce_loss                        | constant, 1 |
| RLOO      | leave_one_out_advantages   | rloo_loss                             | sequence    |
| GRPO      | group_advantages           | clipped_policy_loss + β kl_k3         | sequence    |
| Dr. GRPO  | dr_grpo_advantages         | clipped_policy_loss                   | constant    |
| DAPO      | group_advantages           | clipped_policy_loss, clip_high = 0.28 | token       |
| GSPO      | group_advantages           | gspo_loss                             | sequence    |
| CISPO     | group_advantages           | cispo_loss                            | token       |
| Kimi k1.5 | dr_grpo_advantages         | kimi_policy_loss                      | sequence    |

On the first update of a rollout r = 1: a clipped loss has the value -A and REINFORCE's gradient.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.losses.masking import (
    Advantages,
    Mask,
    PerToken,
    completion_mean,
    completion_sum,
    exp_bounded,
    log_ratio,
    masked,
    per_token,
    upcast,
)


def reinforce_loss(
    logps: PerToken, old_logps: PerToken, advantages: Advantages, mask: Mask
) -> PerToken:
    """Compute -A log π: the policy gradient, for tokens sampled from the policy itself.

    Advantage times nats. `old_logps` is not used: it is there so that all policy losses are called
    alike. Sum over tokens (`per="constant", length=1`) for an unbiased gradient. By hand: A = 2,
    π = 1/2 cost 2 log 2 = 1.386. Source: Williams (1992); RLOO (2402.14740).
    """
    del old_logps
    return -per_token(advantages, mask) * masked(logps, mask)


def clipped_policy_loss(
    logps: PerToken,
    old_logps: PerToken,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PerToken:
    """Compute -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): PPO's surrogate, also GRPO's and
    DAPO's.

    Advantage units. `clip_low` in [0, 1], `clip_high` >= 0: how far the ratio may move before the
    gradient stops; 1 and infinity never stop it. DAPO: 0.2 and 0.28. By hand: r = 1.5, A = 1 cost
    -1.2 without gradient; r = 1.5, A = -1 cost 1.5.
    Source: PPO (1707.06347) Eq. 7; DeepSeekMath (2402.03300) Eq. 3; DAPO (2503.14476) Eq. 8.
    """
    ratio = exp_bounded(log_ratio(logps, old_logps, mask))
    return _clipped_surrogate(ratio, per_token(advantages, mask), clip_low, clip_high)


def dual_clip_policy_loss(
    logps: PerToken,
    old_logps: PerToken,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> PerToken:
    """Bound the clipped loss by `dual_clip` |A| where A < 0, however large the ratio.

    Advantage units. `dual_clip` > 1 + clip_high (published 3); at infinity it is
    `clipped_policy_loss`. By hand: r = 5, A = -1 cost 3 without gradient.
    Source: Ye et al. (1912.09729) Eq. 5.
    """
    ratio = exp_bounded(log_ratio(logps, old_logps, mask))
    advantages = per_token(advantages, mask)
    loss = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def two_sided_policy_loss(
    logps: PerToken,
    old_logps: PerToken,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_cap: float = 4.0,
) -> PerToken:
    """Compute -min(min(r, ratio_cap) A, clip(r, 1 - clip_low, 1 + clip_high) A): a bound on the
    ratio also where A < 0, set on the ratio itself.

    Advantage units. `ratio_cap` > 1 + clip_high; at infinity it is `clipped_policy_loss`. By hand:
    r = 5, A = -1, cap 4 cost 4 without gradient. Source: INTELLECT-2 (2505.07291).
    """
    ratio = exp_bounded(log_ratio(logps, old_logps, mask))
    advantages = per_token(advantages, mask)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio.clamp(max=ratio_cap) * advantages, clipped * advantages)


def gspo_loss(
    logps: PerToken,
    old_logps: PerToken,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PerToken:
    """Compute -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) with s the geometric mean of the
    completion's token ratios: the whole completion is clipped or not.

    Advantage units; every token of a completion carries the completion's loss, so that weights per
    "sequence" average completions (weights per "token" would favour long ones). The published range
    is 3e-4 and 4e-4, tiny because s is a mean; 1 and infinity never clip. By hand: token ratios 4
    and 1 give s = 2. With one token it is `clipped_policy_loss`. Source: GSPO (2507.18071) Eq. 5
    and 7.
    """
    mean_log_ratio = completion_mean(log_ratio(logps, old_logps, mask), mask)  # (B, T) -> (B, 1)
    ratio = exp_bounded(mean_log_ratio)
    return _clipped_surrogate(ratio, per_token(advantages, mask), clip_low, clip_high)


def gspo_token_loss(
    logps: PerToken,
    old_logps: PerToken,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PerToken:
    """Compute GSPO with an advantage per token: the ratio has the completion's value s, the token's
    gradient.

    Advantage units. Ranges as in `gspo_loss`, whose value and (weights per "sequence") gradient it
    has where a completion's tokens share one advantage. By hand: ratios 4 and 1, A = (1, 0), no
    clip cost (-2, 0). Source: GSPO (2507.18071) Eq. 13 and 14.
    """
    sequence = completion_mean(log_ratio(logps, old_logps, mask), mask).detach()
    logps = masked(logps, mask)
    ratio = exp_bounded(sequence + (logps - logps.detach()))
    return _clipped_surrogate(ratio, per_token(advantages, mask), clip_low, clip_high)


def rloo_loss(
    logps: PerToken,
    old_logps: PerToken,
    advantages: Advantages,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PerToken:
    """Compute -min(R A, clip(R, 1 - clip_low, 1 + clip_high) A) with R the product of the
    completion's token ratios: the completion as one action. Also R1's Eq. 1, read to the letter.

    Advantage units; every token of a completion carries the completion's loss, for weights per
    "sequence". Ranges as in `clipped_policy_loss`; but R explodes or vanishes on long completions
    unless the policy has hardly moved. By hand: token ratios 1.1 and 1.2, A = 1 cost -1.2 (R = 1.32
    is clipped).
    Source: RLOO (2402.14740) with PPO's clip, as in TRL; DeepSeek-R1 (2501.12948) Eq. 1.
    """
    ratio = exp_bounded(completion_sum(log_ratio(logps, old_logps, mask)))  # (B, T) -> (B, 1)
    return _clipped_surrogate(ratio, per_token(advantages, mask), clip_low, clip_high)


def cispo_loss(
    logps: PerToken,
    old_logps: PerToken,
    advantages: Advantages,
    mask: Mask,
    *,
    ratio_cap: float = 5.0,
    ratio_floor: float = 0.0,
) -> PerToken:
    """Compute -sg(clip(r, ratio_floor, ratio_cap)) A log π: the weight is clipped, the gradient
    never.

    Advantage times nats: the value depends on log π and compares across runs only loosely.
    `ratio_cap` is absolute (ScaleRL: 5; "1 + ε" elsewhere): 1 forbids up-weighting, infinity is
    importance-weighted REINFORCE. `ratio_floor` 0 is MiniMax's choice. By hand: r = 8, π = 1/2,
    A = 1 cost 5 log 2 = 3.47. Source: MiniMax-M1 (2506.13585) Eq. 4 and 5.
    """
    ratio = exp_bounded(log_ratio(logps, old_logps, mask)).clamp(ratio_floor, ratio_cap)
    return -ratio.detach() * per_token(advantages, mask) * masked(logps, mask)


def token_entropy(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """Compute -Σ p log p of the next-token distribution at each position.

    Nats, gradient kept, not reduced or masked. As a bonus, *subtract* a small multiple from the
    loss. By hand: log V for equal logits, 0 for a certain token.
    """
    logps = upcast(logits).log_softmax(dim=-1)
    return -(logps.exp() * logps).sum(dim=-1)


def _clipped_surrogate(
    ratio: Float[Tensor, "B _"], advantages: PerToken, clip_low: float, clip_high: float
) -> PerToken:
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)
