"""The policy losses, importance corrections and masks against their golden cases."""

import pytest
import torch

from posttrain.losses import (
    cispo_loss,
    clipped_policy_loss,
    dppo_kl_loss,
    dppo_tv_loss,
    dual_clip_policy_loss,
    gspo_loss,
    gspo_token_loss,
    icepop_weights,
    kimi_policy_loss,
    kimi_squared_loss,
    kimi_token_loss,
    kl_k3,
    off_policy_mask,
    reinforce_loss,
    rloo_loss,
    sequence_mask_weights,
    sequence_tis_weights,
    tis_weights,
    token_entropy,
    token_weights,
)
from tests.golden import load


def rollout(c):
    return c.logp, c.old, c.adv, c.mask


def mean(loss, c, **weights):
    return (loss * token_weights(c.mask, **weights)).sum()


def clipped(c):
    """The clipped loss under whichever names the case gives its clip range."""
    low = getattr(c, "eps_low", None) or c.eps
    high = getattr(c, "eps_high", None) or c.eps
    return clipped_policy_loss(*rollout(c), clip_low=low, clip_high=high)


def grpo_with_kl(c):
    kl = kl_k3(c.logp, c.ref, c.mask)
    return mean(clipped(c) + c.beta * kl, c, per="sequence")


def corrected(weights, **settings):
    def loss(c):
        factor = weights(c.old, c.rollout, c.mask, **settings)
        c.check_output(factor, "weights")
        return mean(clipped(c) * factor, c)

    return loss


def sequence_clip(c):
    loss = rloo_loss(*rollout(c), clip_low=c.eps, clip_high=c.eps)
    return mean(loss, c, per="sequence")


def gspo(loss):
    def run(c):
        per_token = loss(*rollout(c), clip_low=c.eps_low, clip_high=c.eps_high)
        return mean(per_token, c, per="sequence")

    return run


def off_policy(c):
    kept = off_policy_mask(*rollout(c), threshold=c.delta)
    c.check_output(kept.amax(dim=1), "keep")
    return mean(clipped(c) * kept, c, per="sequence")


def dppo_tv(c):
    """The case sums over tokens."""
    return dppo_tv_loss(
        c.logp, c.rollout, c.adv, c.mask, clip_low=c.d_low, clip_high=c.d_high, tau=c.tau
    ).sum()


def kimi(loss, baseline=lambda c: c.reward.mean()):
    """Answers as sequences of one token that carries the summed log-prob."""

    def run(c):
        column = torch.ones(len(c.reward), 1, dtype=torch.float64)
        advantages = c.reward - baseline(c)
        per_token = loss(c.seq_logp[:, None], c.seq_old[:, None], advantages, column, tau=c.tau)
        return per_token.mean()

    return run


def log_partition(c):
    return c.tau * (c.reward / c.tau).exp().mean().log()


GOLDEN = {
    "ppo_policy_clip_token_mean": lambda c: mean(clipped(c), c),
    "ppo_policy_dual_clip": lambda c: mean(
        dual_clip_policy_loss(*rollout(c), clip_low=c.eps, clip_high=c.eps, dual_clip=c.c), c
    ),
    "entropy_bonus": lambda c: token_entropy(c.logits).mean(),
    "reinforce_token_sum": lambda c: mean(
        reinforce_loss(c.logp, c.logp, c.adv, c.mask), c, per="constant", length=1
    ),
    "rloo_sequence_clip": sequence_clip,
    "grpo_seqmean_kl": grpo_with_kl,
    "grpo_seqmean": lambda c: mean(clipped(c), c, per="sequence"),
    "grpo_r1_eq1_sequence_ratio": sequence_clip,
    "dr_grpo_constant_length": lambda c: mean(clipped(c), c, per="constant", length=c.L_max),
    "dapo_token_mean_clip_higher": lambda c: mean(clipped(c), c),
    "dapo_group_token_mean": lambda c: mean(clipped(c), c, per="group", group_size=2),
    "gspo_sequence": gspo(gspo_loss),
    "cispo_upper_only": lambda c: mean(cispo_loss(*rollout(c), ratio_cap=c.upper), c),
    "cispo_two_sided": lambda c: mean(
        cispo_loss(*rollout(c), ratio_cap=1 + c.eps_high, ratio_floor=1 - c.eps_low), c
    ),
    "tis_token_truncate": corrected(tis_weights),
    "mis_token_mask_icepop": corrected(icepop_weights),
    "tis_sequence_truncate": corrected(sequence_tis_weights),
    "mis_sequence_mask": corrected(sequence_mask_weights, cap=2.0),
    "dppo_binary_tv_plus_quadratic": dppo_tv,
    "dppo_binary_kl": lambda c: mean(dppo_kl_loss(*rollout(c), max_kl=c.d, ratio_cap=c.C), c),
    "grpo_offpolicy_sequence_mask": off_policy,
    "kimi_omd_mean_baseline": kimi(kimi_policy_loss),
    "kimi_squared_logz": kimi(kimi_squared_loss, log_partition),
    "kimi_squared_mean": kimi(kimi_squared_loss),
}


@pytest.mark.parametrize("case_id", GOLDEN)
def test_golden_value_and_gradient(case_id):
    case = load("policy")[case_id]
    case.check(GOLDEN[case_id](case))


def test_every_golden_case_is_tested():
    assert GOLDEN.keys() == load("policy").keys()


def test_gspo_token_has_gspos_golden_value_and_gradient():
    case = load("policy")["gspo_sequence"]
    case.check(gspo(gspo_token_loss)(case))


def test_kimi_token_form_of_one_token_answers_has_the_golden_value_and_gradient():
    case = load("policy")["kimi_omd_mean_baseline"]
    case.check(kimi(kimi_token_loss)(case))
