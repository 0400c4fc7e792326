"""Preference losses that judge each completion by itself and move its own log-ratio.

The first half takes pairs; β h_w and β h_l are the implicit rewards of `preference.py`. The second
half takes single completions, each marked desirable or not, as thumbs up and down give them. As
there: log-probs are sums over whole completions in nats, results are per pair or per completion,
nothing is reduced, β > 0 ties the policy to the reference, the reference carries no gradient.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.losses.masking import PerPair, upcast
from posttrain.losses.preference import log_ratios

PerCompletion = Float[Tensor, " B"]
Marks = Bool[Tensor, " B"]


def nca_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.01,
) -> PerPair:
    """Compute -log σ(β h_w) - ½ log σ(-β h_w) - ½ log σ(-β h_l): noise contrastive alignment, which
    keeps the likelihood of chosen completions from falling.

    Nats per pair. `beta` > 0, published 0.01. By hand: 2 log 2 at policy = reference.
    Source: NCA (2402.05369) section 4.1, for K = 2.
    """
    reward_w, reward_l = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    both = F.logsigmoid(-reward_w) + F.logsigmoid(-reward_l)
    return -F.logsigmoid(reward_w) - 0.5 * both


def bco_pair_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.1,
) -> PerPair:
    """Compute -log σ(β h_w) - log σ(-β h_l): a binary classifier of good and bad, without reward
    shift.

    Nats per pair. `beta` > 0. By hand: 2 log 2 at policy = reference; an upper bound of DPO's
    loss. Source: BCO (2404.04656) section 4.
    """
    reward_w, reward_l = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return -F.logsigmoid(reward_w) - F.logsigmoid(-reward_l)


def sppo_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 1e-3,
) -> PerPair:
    """Compute (h_w - 1/(2β))² + (h_l + 1/(2β))²: self-play towards log-ratios of ±1/(2β), with win
    probabilities of 1 and 0 (the "hard" form).

    Nats² per pair. `beta` > 0 is the paper's 1/η, published 1e-3. By hand: β = 0.1 at policy =
    reference costs 25 + 25. Source: SPPO (2405.00675) section 3.
    """
    h_w, h_l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    return (h_w - 1 / (2 * beta)).square() + (h_l + 1 / (2 * beta)).square()


def apo_zero_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.1,
) -> PerPair:
    """Compute 1 - σ(β h_w) + σ(β h_l): raise chosen, lower rejected; for data better than the
    policy.

    A probability scale, 0 to 2 per pair. `beta` > 0. By hand: 1 at policy = reference.
    Source: APO (2408.06266) Eq. 7.
    """
    reward_w, reward_l = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return (-reward_w).sigmoid() + reward_l.sigmoid()


def apo_down_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.1,
) -> PerPair:
    """Compute σ(β h_w) + 1 - σ(β (h_w - h_l)): lower both, rejected more; for data worse than the
    policy.

    A probability scale, 0 to 2 per pair. `beta` > 0. By hand: 1 at policy = reference.
    Source: APO (2408.06266) Eq. 8.
    """
    reward_w, reward_l = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return reward_w.sigmoid() + (reward_l - reward_w).sigmoid()


def kto_loss(
    logps: PerCompletion,
    ref_logps: PerCompletion,
    desirable: Marks,
    *,
    reference_point: Float[Tensor, ""],
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> PerCompletion:
    """Compute λ_D (1 - σ(β (h - z₀))) for desirable completions, λ_U (1 - σ(β (z₀ - h))) for
    others: a value function of gains and losses around z₀.

    A probability scale, 0 to λ per completion. `reference_point` is z₀ in nats, from
    `kto_reference_point`; no gradient passes through it. `weights` are (λ_D, λ_U), both > 0, so
    that λ_D n_D / (λ_U n_U) lies in [1, 3/2] for n_D desirable and n_U undesirable completions. By
    hand: λ/2 at h = z₀. Source: KTO (2402.01306) Eq. 8.
    """
    surplus = beta * (upcast(logps) - upcast(ref_logps) - reference_point.detach())
    return _weighted(desirable, (-surplus).sigmoid(), surplus.sigmoid(), weights)


def kto_reference_point(kl_logps: PerCompletion, kl_ref_logps: PerCompletion) -> Float[Tensor, ""]:
    """Compute z₀ = max(0, mean of h over mismatched completions): KTO's estimate of KL(π‖π_ref), in
    nats.

    Takes log-probs of completions to *other* prompts of the batch (rotated by one), at least two.
    No gradient. Gather over ranks first: the mean is taken before the cut at 0. By hand: h of 1 and
    -3 give 0. Source: KTO (2402.01306) section 4.1.
    """
    return (upcast(kl_logps) - upcast(kl_ref_logps)).detach().mean().clamp(min=0)


def apo_zero_unpaired_loss(
    logps: PerCompletion,
    ref_logps: PerCompletion,
    desirable: Marks,
    *,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> PerCompletion:
    """Compute λ_D (1 - σ(β h)) for desirable completions, λ_U σ(β h) for others: APO-zero without
    pairs, or KTO with its reference point fixed at 0.

    A probability scale per completion; `weights` are (λ_D, λ_U) as in `kto_loss`. By hand: λ/2 at
    policy = reference. Source: APO (2408.06266) Eq. 7.
    """
    reward = beta * (upcast(logps) - upcast(ref_logps))
    return _weighted(desirable, (-reward).sigmoid(), reward.sigmoid(), weights)


def bco_unpaired_loss(
    logps: PerCompletion,
    ref_logps: PerCompletion,
    desirable: Marks,
    *,
    beta: float = 0.1,
    reward_shift: Float[Tensor, ""] | float = 0.0,
) -> PerCompletion:
    """Compute -log σ(β h - δ) for desirable completions, -log σ(δ - β h) for others: a binary
    classifier.

    Nats per completion. `reward_shift` δ is the running mean of implicit rewards β h over both
    kinds, kept by the caller; 0 is plain classification. By hand: log 2 at β h = δ.
    Source: BCO (2404.04656) section 4.
    """
    surplus = beta * (upcast(logps) - upcast(ref_logps)) - reward_shift
    return -F.logsigmoid(torch.where(desirable, surplus, -surplus))


def _rewards(
    chosen: PerPair, rejected: PerPair, ref_chosen: PerPair, ref_rejected: PerPair, beta: float
) -> tuple[PerPair, PerPair]:
    h_w, h_l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    return beta * h_w, beta * h_l


def _weighted(
    desirable: Marks, good: PerCompletion, bad: PerCompletion, weights: tuple[float, float]
) -> PerCompletion:
    return torch.where(desirable, weights[0] * good, weights[1] * bad)
