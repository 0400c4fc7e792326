"""Preference losses on the *margin* by which the policy beats the reference in its preference.

Every function takes log-probs of whole completions, in nats and summed over their tokens (EOS
included), one number per pair, and returns one loss per pair. Nothing is reduced, masked or
detached; the reference log-probs should carry no gradient. In the formulas below

    h_w = log π(chosen) - log π_ref(chosen)      h_l = the same for rejected
    z = β (h_w - h_l)                            β h: the implicit reward

β > 0 is the weight of the KL constraint: small β lets the policy move far from the reference, large
β keeps it close. Losses that judge each completion by itself are in `pointwise.py`, those without a
reference in `reference_free.py`.
"""

import math

import torch.nn.functional as F

from posttrain.losses.masking import LOG_RATIO_BOUND, Lengths, PerPair, upcast


def dpo_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.1,
) -> PerPair:
    """Compute -log σ(z): the logistic loss of direct preference optimisation.

    Nats per pair. `beta` > 0, published 0.1 to 0.5. By hand: log 2 where the policy is the
    reference, whatever the completions. Source: DPO (2305.18290) Eq. 7.
    """
    return -F.logsigmoid(beta * _margin(chosen, rejected, ref_chosen, ref_rejected))


def dpo_length_norm_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    beta: float = 5.0,
) -> PerPair:
    """Compute DPO with each log-ratio divided by the completion's length: -log σ(β (h_w/|w| -
    h_l/|l|)).

    Nats per pair; lengths in tokens. `beta` is larger than DPO's by about the length: published 5.
    By hand: h_w = 4 over 2 tokens, h_l = 3 over 3 tokens, β = 1 cost -log σ(1) = 0.313.
    Source: Tülu 3 (2411.15124), length-normalised DPO.
    """
    h_w, h_l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    return -F.logsigmoid(beta * (h_w / chosen_lengths - h_l / rejected_lengths))


def hinge_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.05,
) -> PerPair:
    """Compute max(0, 1 - z): no gradient once the margin is won.

    Without unit. 1/`beta` is the margin in nats (RSO: beta 0.05). By hand: 1 where the policy is
    the reference. Source: SLiC-HF (2305.10425) section 2; RSO (2309.06657).
    """
    return (1 - beta * _margin(chosen, rejected, ref_chosen, ref_rejected)).relu()


def ipo_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.1,
) -> PerPair:
    """Compute (h_w - h_l - 1/(2β))²: a squared distance to a finite margin, so that it cannot
    overfit.

    Nats² per pair. `beta` > 0 (the paper's τ): the target margin is 1/(2β) nats. By hand: β = 0.1
    at policy = reference costs 5² = 25. Source: IPO (2310.12036) Eq. 17.
    """
    return (_margin(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)).square()


def ipo_avg_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    beta: float = 0.1,
) -> PerPair:
    """Compute IPO on log-ratios averaged over tokens: (h_w/|w| - h_l/|l| - 1/(2β))².

    (Nats per token)² per pair; lengths in tokens. `beta` > 0: the target is 1/(2β) nats *per
    token*, so a β tuned for `ipo_loss` is too small here. By hand: β = 0.1 at policy = reference
    costs 25. Source: TRL's and HALOs' reading of IPO (2310.12036) Eq. 17.
    """
    h_w, h_l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    return (h_w / chosen_lengths - h_l / rejected_lengths - 1 / (2 * beta)).square()


def cdpo_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> PerPair:
    """Compute -(1-ε) log σ(z) - ε log σ(-z): DPO for labels that are wrong with probability ε.

    Nats per pair. `label_smoothing` ε in [0, 0.5): 0 is DPO; else the gradient vanishes at
    σ(z) = 1 - ε. By hand: log 2 at policy = reference for every ε.
    Source: E. Mitchell, "A note on DPO with noisy preferences" (2023) Eq. 3.
    """
    _check_smoothing(label_smoothing)
    return _smoothed(beta * _margin(chosen, rejected, ref_chosen, ref_rejected), label_smoothing)


def robust_dpo_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> PerPair:
    """Compute [-(1-ε) log σ(z) + ε log σ(-z)] / (1 - 2ε): under labels flipped with probability ε
    its expectation is DPO's loss on the true labels.

    Nats per pair, unbounded below. `label_smoothing` ε in [0, 0.5): 0 is DPO, towards 0.5 it
    diverges. By hand: log 2 at policy = reference. Source: rDPO (2403.00409) section 3.1.
    """
    _check_smoothing(label_smoothing)
    z = beta * _margin(chosen, rejected, ref_chosen, ref_rejected)
    unbiased = (1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return -unbiased / (1 - 2 * label_smoothing)


def exo_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> PerPair:
    """Compute KL([σ(z), σ(-z)] ‖ [1-ε, ε]): the reverse of the KL that cDPO minimises.

    Nats per pair. `label_smoothing` ε in (0, 0.5): towards 0 the loss diverges, as the target
    leaves no mass for the rejected completion. By hand: ε = 0.1 at policy = reference costs ½
    log(½/0.9) + ½ log(½/0.1) = 0.511. Source: EXO (2402.00856) Eq. 16.
    """
    _check_smoothing(label_smoothing, zero_allowed=False)
    z = beta * _margin(chosen, rejected, ref_chosen, ref_rejected)
    win = z.sigmoid() * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    lose = (-z).sigmoid() * (F.logsigmoid(-z) - math.log(label_smoothing))
    return win + lose


def discopop_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.05,
    tau: float = 0.05,
) -> PerPair:
    """Compute (1-k)(-log σ(z)) + k e^-z with k = σ(z/τ): a blend of the logistic and exponential
    losses.

    Per pair, without unit. `tau` in (0, 1], published 0.05: towards 0 a switch at z = 0; above 1
    the loss would overflow for lost pairs. Not monotone: near z = 0 it falls towards *smaller*
    margins. By hand: (log 2 + 1)/2 = 0.847 at policy = reference.
    Source: DiscoPOP (2406.08414) Eq. 5.
    """
    z = beta * _margin(chosen, rejected, ref_chosen, ref_rejected)
    exponential = (F.logsigmoid(z / tau) - z).exp()  # k e^-z, whose factors would overflow alone
    return (-z / tau).sigmoid() * -F.logsigmoid(z) + exponential


def aot_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> PerPair:
    """Compute DPO between the batch's sorted policy margins and its sorted reference margins: the
    policy's distribution of margins should dominate the reference's (paired form).

    Nats; entry i belongs to quantile i, not to pair i, and depends on the whole batch: use large
    micro-batches. `label_smoothing` in [0, 0.5). By hand: a batch of one pair is cDPO.
    Source: AOT (2406.05882) section 3.
    """
    _check_smoothing(label_smoothing)
    margins = (upcast(chosen) - upcast(rejected)).sort().values
    ref_margins = (upcast(ref_chosen) - upcast(ref_rejected)).sort().values
    return _smoothed(beta * (margins - ref_margins), label_smoothing)


def aot_unpaired_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> PerPair:
    """Compute DPO between the batch's sorted h_w and sorted h_l: chosen completions should dominate
    rejected ones as distributions, whatever prompt they answer.

    Nats; entry i belongs to quantile i, not to pair i, and depends on the whole batch.
    `label_smoothing` in [0, 0.5). By hand: a batch of one pair is cDPO.
    Source: AOT (2406.05882) section 3.
    """
    _check_smoothing(label_smoothing)
    h_w, h_l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    return _smoothed(beta * (h_w.sort().values - h_l.sort().values), label_smoothing)


def fdpo_forward_kl_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.1,
) -> PerPair:
    """Compute DPO with the forward KL as constraint: every log-ratio h becomes 1 - e^-h.

    Nats per pair. `beta` > 0. An h below -20 nats counts as -20 and gets no gradient. By hand:
    log 2 at policy = reference. Source: f-DPO (2309.16240).
    """
    h_w, h_l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    score_w, score_l = (-(-h.clamp(min=-LOG_RATIO_BOUND)).expm1() for h in (h_w, h_l))
    return -F.logsigmoid(beta * (score_w - score_l))


def fdpo_js_loss(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: float = 0.1,
) -> PerPair:
    """Compute DPO with the Jensen-Shannon divergence as constraint: every log-ratio h becomes log 2
    + log σ(h).

    Nats per pair. `beta` > 0. By hand: log 2 at policy = reference.
    Source: f-DPO (2309.16240).
    """
    h_w, h_l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    return -F.logsigmoid(beta * (F.logsigmoid(h_w) - F.logsigmoid(h_l)))


def log_ratios(
    chosen: PerPair, rejected: PerPair, ref_chosen: PerPair, ref_rejected: PerPair
) -> tuple[PerPair, PerPair]:
    """Return h_w and h_l, the nats by which the policy likes each completion more than the
    reference does.

    Times β these are the implicit rewards to log. By hand: 0 and 0 at policy = reference.
    """
    return upcast(chosen) - upcast(ref_chosen), upcast(rejected) - upcast(ref_rejected)


def _margin(
    chosen: PerPair, rejected: PerPair, ref_chosen: PerPair, ref_rejected: PerPair
) -> PerPair:
    h_w, h_l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    return h_w - h_l


def _smoothed(z: PerPair, label_smoothing: float) -> PerPair:
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def _check_smoothing(label_smoothing: float, *, zero_allowed: bool = True) -> None:
    allowed = 0 <= label_smoothing < 0.5 and (zero_allowed or label_smoothing > 0)
    if not allowed:
        interval = "[0, 0.5)" if zero_allowed else "(0, 0.5)"
        raise ValueError(
            f"label_smoothing: expected a value in {interval}; found {label_smoothing}."
        )
