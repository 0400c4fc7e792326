"""Advantages: how much better a completion, or a token, was than expected.

Of groups: rewards (P, G) of G completions to each of P prompts -> advantages (P, G), one per
completion, shared by its tokens. NaN marks a completion that could not be scored: it is left out of
its group's statistics and gets advantage 0. Equal rewards give exactly 0. Of tokens: (B, T) with a
mask, for PPO and REINFORCE++; 0 where the mask is 0, which may lie between trained tokens (a tool's
output).

Nothing here carries a gradient or talks to other ranks. A group belongs on one rank; where the
statistics of a whole batch are used, that is the batch passed in.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from posttrain.losses.masking import Mask, PerToken, masked, upcast

PerCompletion = Float[Tensor, "P G"]


def group_advantages(
    rewards: PerCompletion, *, eps: float = 1e-4, unbiased: bool = True
) -> PerCompletion:
    """Compute (r - mean) / (std + eps) within each group: GRPO's advantage.

    In standard deviations. `eps` > 0 damps groups of nearly equal rewards (TRL 1e-4, verl 1e-6).
    `unbiased` divides the variance by G - 1, else by G. By hand: rewards (1, 0) give ±0.5/0.7071 =
    ±0.707 (eps aside). Raises ValueError for G = 1.
    Source: DeepSeekMath (2402.03300) section 4.1.2.
    """
    centred, scored = _centred(rewards)
    counted = scored.sum(dim=1, keepdim=True) - int(unbiased)  # (P, G) -> (P, 1)
    variance = centred.square().sum(dim=1, keepdim=True) / counted.clamp(min=1)
    return centred / (variance.sqrt() + eps)


def dr_grpo_advantages(rewards: PerCompletion) -> PerCompletion:
    """Compute r - mean within each group: without the division that favours very easy and hard
    prompts.

    In reward units. By hand: rewards (1, 0, 0, 0) give (0.75, -0.25, -0.25, -0.25). Raises
    ValueError for G = 1. Source: Dr. GRPO (2503.20783) section 3; Kimi k1.5 (2501.12599) Eq. 3.
    """
    return _centred(rewards)[0]


def leave_one_out_advantages(rewards: PerCompletion) -> PerCompletion:
    """Compute r - mean of the group's *other* completions: an unbiased baseline; G/(G-1) times Dr.
    GRPO's.

    In reward units. By hand: rewards (1, 0, 0, 0) give (1, -1/3, -1/3, -1/3). A completion that is
    alone in being scored gets 0. Raises ValueError for G = 1. Source: RLOO (2402.14740).
    """
    centred, scored = _centred(rewards)
    num_scored = scored.sum(dim=1, keepdim=True)  # (P, G) -> (P, 1)
    return centred * num_scored / (num_scored - 1).clamp(min=1)


def batch_std_advantages(rewards: PerCompletion, *, eps: float = 1e-4) -> PerCompletion:
    """Compute (r - group mean) / (std of all rewards of the batch + eps): one scale for easy and
    hard prompts.

    In standard deviations (unbiased, of raw rewards). `eps` > 0. By hand: groups (1, 0) and (1, 1)
    have a standard deviation of 0.5 and give (1, -1) and (0, 0). Raises ValueError for G = 1.
    Source: Lite-PPO (2508.08221); TRL's scale_rewards="batch".
    """
    centred, scored = _centred(rewards)
    all_scored = rewards[scored]
    deviation = all_scored - all_scored.mean()
    variance = deviation.square().sum() / max(len(deviation) - 1, 1)
    return centred / (variance.sqrt() + eps)


def log_partition_advantages(rewards: PerCompletion, *, tau: float) -> PerCompletion:
    """Compute r - tau log mean exp(r / tau) within each group: the exact baseline of Kimi k1.5's
    objective.

    In reward units. `tau` > 0: when large the baseline is the mean, towards 0 the best reward. By
    hand: tau = 1 and rewards (log 3, 0) have the baseline log 2 and give (log 1.5, -log 2).
    Raises ValueError for G = 1. Source: Kimi k1.5 (2501.12599) Eq. 2.
    """
    centred, scored = _centred(rewards)
    exponents = centred.masked_fill(~scored, -torch.inf) / tau
    num_scored = scored.sum(dim=1, keepdim=True).to(centred.dtype)  # (P, G) -> (P, 1)
    baseline = tau * (exponents.logsumexp(dim=1, keepdim=True) - num_scored.log())
    return torch.where(scored, centred - baseline, 0)


def process_advantages(
    step_rewards: Float[Tensor, "P G T"], *, eps: float = 1e-4, unbiased: bool = True
) -> Float[Tensor, "P G T"]:
    """Compute at each token the sum of (r - mean) / (std + eps) over the steps that end there or
    later, with the statistics of all steps of the group: GRPO's process supervision.

    `step_rewards` stand at the last token of each step, NaN everywhere else. In standard
    deviations, added up; `eps` and `unbiased` as in `group_advantages`. By hand: completions of two
    tokens, each a step, with rewards (1, 0) and (1, 1) have mean 0.75 and std 0.5, and get
    (0.5 - 1.5, -1.5) and (0.5 + 0.5, 0.5). Source: DeepSeekMath (2402.03300) section 4.1.3.
    """
    normalised = group_advantages(step_rewards.flatten(1), eps=eps, unbiased=unbiased)
    normalised = normalised.view_as(step_rewards)  # (P, G*T) -> (P, G, T)
    return normalised.flip(-1).cumsum(-1).flip(-1)


def rlhf_token_rewards(
    scores: Float[Tensor, " B"],
    old_logps: PerToken,
    ref_logps: PerToken,
    mask: Mask,
    *,
    kl_coef: float = 0.05,
) -> PerToken:
    """Compute -kl_coef (log π_old - log π_ref) at every token, plus the completion's score at its
    last one.

    Reward units; log-probs in nats, of rollout time. `kl_coef` >= 0: 0 leaves the score alone.
    `scores` must be finite: mask out completions that could not be scored. By hand: two tokens with
    log-ratio 1, score 2, kl_coef 0.1 give (-0.1, 1.9). Source: InstructGPT (2203.02155) Eq. 2.
    """
    rewards = -kl_coef * (masked(old_logps, mask) - masked(ref_logps, mask))
    trained = mask.bool()
    remaining = trained.flip(1).cumsum(1).flip(1)  # trained tokens from here on
    last = trained & (remaining == 1)
    return rewards + torch.where(last, scores.unsqueeze(1), 0)


def gae(
    rewards: PerToken, values: PerToken, mask: Mask, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[PerToken, PerToken]:
    """Compute generalised advantage estimates, and the returns (advantage + value) that the critic
    learns.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, with V and A of 0 after
    the last trained token; t+1 is the next *trained* token, over any gap. Reward units, not
    whitened; `values` count as data. `gamma` in [0, 1] discounts (1 for language models), `lam` in
    [0, 1] trades bias (0: one step) for variance (1: Monte Carlo return minus value). By hand:
    rewards (0, 1), values (0.5, 0.5), gamma 1, lam 0.5 give (0.25, 0.5).
    Source: GAE (1506.02438) Eq. 16.
    """
    trained = mask.bool()
    rewards, values = masked(rewards, mask), masked(values.detach(), mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(trained[:, t], advantage, 0)
        next_value = torch.where(trained[:, t], values[:, t], next_value)
        next_advantage = torch.where(trained[:, t], advantage, next_advantage)
    return advantages, advantages + values


def returns_to_go(rewards: PerToken, mask: Mask, *, gamma: float = 1.0) -> PerToken:
    """Compute the discounted sum of the rewards from each token on: `gae` without a critic.

    Reward units. `gamma` in [0, 1]; 0 is the token's own reward. By hand: rewards (1, 2, 4) with
    gamma 0.5 give (3, 4, 4). Source: Sutton and Barto (2018) Eq. 3.8.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[1]


def reinforce_pp_advantages(token_rewards: PerToken, mask: Mask, *, gamma: float = 1.0) -> PerToken:
    """Compute REINFORCE++ advantages: the returns-to-go of `rlhf_token_rewards`, whitened over the
    batch's tokens.

    In standard deviations. `gamma` in [0, 1]. By hand: two completions of one token with rewards 1
    and 0 give ±0.5/0.7071 = ±0.707. Source: REINFORCE++ (2501.03262).
    """
    return whiten(returns_to_go(token_rewards, mask, gamma=gamma), mask)


def reinforce_pp_baseline_advantages(
    rewards: PerCompletion, mask: Shaped[Tensor, "P*G T"]
) -> Float[Tensor, "P*G T"]:
    """Compute REINFORCE++-baseline advantages: r - group mean, given to each token and whitened
    over the batch's tokens. Rows of the mask are the groups' completions in order.

    In standard deviations; long completions weigh more in the statistics. By hand: one group with
    rewards (1, 0) and one token each gives ±0.707. Raises ValueError for G = 1.
    Source: REINFORCE++ (2501.03262), baseline variant.
    """
    centred, scored = _centred(rewards)
    mask = mask.bool() & scored.reshape(-1, 1)  # (P, G) -> (P*G, 1)
    return whiten(centred.reshape(-1, 1).expand(mask.shape), mask)


def whiten(values: PerToken, mask: Mask, *, eps: float = 1e-8, unbiased: bool = True) -> PerToken:
    """Compute (v - mean) / sqrt(var + eps) over all tokens with mask 1; 0 elsewhere.

    In standard deviations. `eps` > 0 keeps equal values at 0; `unbiased` divides the variance by
    n - 1 (verl, TRL), else by n (OpenAI, OpenRLHF). Fewer than two tokens give 0. Whiten
    advantages, never returns. By hand: values (1, 0) give ±0.5/0.7071 = ±0.707.
    Source: openai/lm-human-preferences, core.py.
    """
    values, trained = masked(values, mask), mask.bool()
    count = trained.sum()
    centred = torch.where(trained, values - values.sum() / count.clamp(min=1), 0)
    variance = centred.square().sum() / (count - int(unbiased)).clamp(min=1)
    return centred * (variance + eps).rsqrt()


def _centred(rewards: PerCompletion) -> tuple[PerCompletion, Shaped[Tensor, "P G"]]:
    """Rewards minus their group's mean (0 for unscored completions), and which completions were
    scored."""
    if rewards.shape[1] < 2:
        raise ValueError(
            "An advantage within a group needs at least 2 answers a prompt; found rewards of shape "
            f"{tuple(rewards.shape)}. Generate more answers per prompt, or use a critic (gae)."
        )
    rewards, scored = upcast(rewards), ~rewards.isnan()
    # Measured from the group's smallest reward, equal rewards are exactly 0 and so is their mean:
    # divided by a tiny std, a rounding error would become an advantage.
    smallest = rewards.masked_fill(~scored, torch.inf).amin(dim=1, keepdim=True)
    above = torch.where(scored, rewards - smallest, 0)
    mean = above.sum(dim=1, keepdim=True) / scored.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(scored, above - mean, 0), scored
