import math

import pytest
import torch

from posttrain.advantages import (
    batch_std_advantages,
    dr_grpo_advantages,
    gae,
    group_advantages,
    leave_one_out_advantages,
    log_partition_advantages,
    process_advantages,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
    returns_to_go,
    rlhf_token_rewards,
    whiten,
)
from tests.golden import load


def by_group(advantage, **settings):
    """The cases hold a flat list of two groups of four."""
    return lambda c: {"advantages": advantage(c.rewards.view(2, 4), **settings).flatten()}


def rewards_with_kl(c, scores):
    return rlhf_token_rewards(scores, c.old, c.ref, c.mask, kl_coef=c.kl_coef)


def reinforce_pp(c):
    rewards = rewards_with_kl(c, c.rewards)
    returns = returns_to_go(rewards, c.mask, gamma=c.gamma)
    return {
        "token_rewards": rewards,
        "returns": returns,
        "advantages": reinforce_pp_advantages(rewards, c.mask, gamma=c.gamma),
        "advantages_biased_var": whiten(returns, c.mask, eps=0.0, unbiased=False),
    }


def estimated(c):
    advantages, returns = gae(c.rewards, c.values, c.mask, gamma=c.gamma, lam=c.lam)
    return {"advantages": advantages, "returns": returns}


def estimated_and_whitened(c):
    outputs = estimated(c)
    return {**outputs, "advantages_whitened": whiten(outputs["advantages"], c.mask)}


def of_steps(c):
    rewards = c.step_rewards.masked_fill(c.is_end == 0, torch.nan)
    return {"advantages": process_advantages(rewards, eps=c.eps)}


GOLDEN = {
    "grpo_adv_trl": by_group(group_advantages, eps=1e-4),
    "grpo_adv_verl": by_group(group_advantages, eps=1e-6),
    "grpo_adv_openrlhf": by_group(group_advantages, eps=1e-9),
    "grpo_adv_population_std": by_group(group_advantages, eps=1e-6, unbiased=False),
    "dr_grpo_adv": by_group(dr_grpo_advantages),
    "grpo_adv_batch_std": by_group(batch_std_advantages),
    "rloo_adv": by_group(leave_one_out_advantages),
    "reinforce_pp_advantage": reinforce_pp,
    "reinforce_pp_baseline_advantage": lambda c: {
        "advantages": reinforce_pp_baseline_advantages(c.rewards.view(1, 4), c.mask)
    },
    "rlhf_token_rewards": lambda c: {"token_rewards": rewards_with_kl(c, c.scores)},
    "gae_g1.0_l0.95": estimated_and_whitened,
    "gae_g0.99_l0.9": estimated_and_whitened,
    "gae_g1.0_l1.0": estimated_and_whitened,
    "gae_masked_hole": estimated,
    "grpo_process_supervision": of_steps,
}


@pytest.mark.parametrize("case_id", GOLDEN)
def test_golden_values(case_id):
    case = load("advantages")[case_id]
    outputs = GOLDEN[case_id](case)
    assert outputs.keys() == case.output_names()
    for name, value in outputs.items():
        case.check_output(value, name)


def test_every_golden_case_is_tested():
    assert GOLDEN.keys() == load("advantages").keys()


def log_partition(rewards):
    return log_partition_advantages(rewards, tau=0.5)


OF_GROUPS = [
    group_advantages,
    dr_grpo_advantages,
    leave_one_out_advantages,
    batch_std_advantages,
    log_partition,
]
every_group_advantage = pytest.mark.parametrize("advantage", OF_GROUPS, ids=lambda f: f.__name__)
NAN = torch.nan


@every_group_advantage
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -1e4])
def test_equal_rewards_give_exactly_zero(advantage, reward):
    """In float32 the mean of seven 0.1 is not 0.1: over a tiny std that would be an advantage."""
    assert (advantage(torch.full((2, 7), reward)) == 0).all()


@every_group_advantage
def test_unscored_answer_gets_zero_and_leaves_its_groups_statistics(advantage):
    with_gap = advantage(torch.tensor([[1.0, NAN, 0.0, 0.5], [0.0, 1.0, 1.0, NAN]]))
    without = [advantage(torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]]))]
    assert with_gap[0, 1] == with_gap[1, 3] == 0
    torch.testing.assert_close(with_gap[0, [0, 2, 3]], without[0][0])
    torch.testing.assert_close(with_gap[1, [0, 1, 2]], without[0][1])


@every_group_advantage
def test_group_with_one_scored_answer_or_none_gives_zero(advantage):
    found = advantage(torch.tensor([[1.0, NAN, NAN], [NAN, NAN, NAN]]))
    assert (found == 0).all()


@every_group_advantage
def test_one_answer_a_prompt_is_refused(advantage):
    with pytest.raises(ValueError, match=r"at least 2 answers a prompt; found .*\(3, 1\)"):
        advantage(torch.ones(3, 1))


@every_group_advantage
def test_order_of_answers_does_not_matter_and_better_ones_get_more(advantage):
    rewards = torch.tensor([[0.3, -1.0, 2.0, 0.4]])
    found = advantage(rewards)
    torch.testing.assert_close(advantage(rewards.flip(1)), found.flip(1))
    assert (found.argsort() == rewards.argsort()).all()


def test_group_advantages_by_hand():
    """(1, 0): ±0.5 over sqrt(0.5)."""
    found = group_advantages(torch.tensor([[1.0, 0.0]]), eps=1e-9)
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, -(0.5**0.5)]]))


def test_group_advantages_do_not_depend_on_the_rewards_scale_or_level():
    rewards = torch.tensor([[0.0, 1.0, 4.0], [2.0, 2.0, 5.0]])
    found = group_advantages(100 * rewards - 30, eps=1e-9)
    torch.testing.assert_close(found, group_advantages(rewards, eps=1e-9))


def test_leave_one_out_is_dr_grpo_times_g_over_g_minus_one():
    rewards = torch.rand(3, 5)
    found = leave_one_out_advantages(rewards)
    torch.testing.assert_close(found, 5 / 4 * dr_grpo_advantages(rewards))
    others = (rewards.sum(1, keepdim=True) - rewards) / 4
    torch.testing.assert_close(found, rewards - others)


def test_batch_std_by_hand():
    """Rewards 1, 0, 1, 1 have the unbiased std 0.5."""
    found = batch_std_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), eps=1e-9)
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


def test_log_partition_by_hand():
    """τ = 1, rewards (log 3, 0): the baseline is log((3 + 1)/2) = log 2."""
    found = log_partition_advantages(torch.tensor([[math.log(3), 0.0]]), tau=1.0)
    torch.testing.assert_close(found, torch.tensor([[math.log(1.5), -math.log(2)]]))


def test_log_partition_with_a_large_tau_is_the_mean_baseline():
    rewards = torch.rand(2, 4, dtype=torch.float64)
    found = log_partition_advantages(rewards, tau=1e6)
    torch.testing.assert_close(found, dr_grpo_advantages(rewards), rtol=0, atol=1e-6)


def test_token_rewards_by_hand():
    """Log-ratio 1, kl_coef 0.1: -0.1 everywhere, and the score on the last trained token."""
    old_logps, ref_logps = torch.full((1, 3), -1.0), torch.full((1, 3), -2.0)
    mask = torch.tensor([[1, 1, 0]])
    found = rlhf_token_rewards(torch.tensor([2.0]), old_logps, ref_logps, mask, kl_coef=0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.1, 1.9, 0.0]]))


def test_answer_without_a_trained_token_gets_no_reward():
    zeros = torch.zeros(1, 2)
    assert (rlhf_token_rewards(torch.ones(1), zeros, zeros, zeros, kl_coef=0.1) == 0).all()


@pytest.fixture
def episode():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]]).double()
    return rewards, values, mask


def test_gae_by_hand():
    """γ = 1, λ = 0.5: A_2 = 1 - 0.5 = 0.5; A_1 = 0 + 0.5 - 0.5 + 0.5 · 0.5 = 0.25."""
    half, ones = torch.full((1, 2), 0.5), torch.ones(1, 2)
    advantages, returns = gae(torch.tensor([[0.0, 1.0]]), half, ones, gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.25, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[0.75, 1.0]]))


def test_gae_at_lambda_one_is_the_monte_carlo_return_minus_the_value(episode):
    rewards, values, mask = episode
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    monte_carlo = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, monte_carlo)
    torch.testing.assert_close(advantages, monte_carlo - values * mask)
    torch.testing.assert_close(returns_to_go(rewards, mask), monte_carlo)


def test_gae_at_lambda_zero_is_the_one_step_error(episode):
    rewards, values, _ = episode
    advantages, _ = gae(rewards, values, torch.ones(3, 6), gamma=0.9, lam=0.0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    torch.testing.assert_close(advantages, rewards + 0.9 * next_values - values)


def test_gae_over_a_gap_is_gae_without_the_gap(episode):
    rewards, values, mask = episode
    trained = mask[1].bool()
    found = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    squeezed = gae(
        rewards[1:2, trained], values[1:2, trained], torch.ones(1, 3), gamma=0.9, lam=0.8
    )
    for with_gap, without in zip(found, squeezed, strict=True):
        torch.testing.assert_close(with_gap[1:2, trained], without)


def test_returns_to_go_by_hand():
    """γ = 0.5: 4; 2 + 2 = 4; 1 + 2 = 3."""
    found = returns_to_go(torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3), gamma=0.5)
    assert found.tolist() == [[3, 4, 4]]


def poisoned(values, mask):
    return values.masked_fill(mask == 0, NAN)


def test_nan_padding_reaches_no_advantage_of_tokens(episode):
    rewards, values, mask = episode
    bad_rewards, bad_values = poisoned(rewards, mask), poisoned(values, mask)
    torch.testing.assert_close(gae(bad_rewards, bad_values, mask), gae(rewards, values, mask))
    torch.testing.assert_close(whiten(bad_values, mask), whiten(values, mask))
    found = rlhf_token_rewards(torch.ones(3).double(), bad_rewards, bad_values, mask)
    assert found.isfinite().all()
    assert (found[mask == 0] == 0).all()


def test_advantages_of_tokens_carry_no_gradient(episode):
    rewards, values, mask = episode
    advantages, returns = gae(rewards, values.requires_grad_(), mask)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_whitened_values_have_mean_zero_and_variance_one_over_the_mask(episode):
    _, values, mask = episode
    found = whiten(values, mask)
    assert (found[mask == 0] == 0).all()
    assert found[mask == 1].mean().item() == pytest.approx(0, abs=1e-12)
    assert found[mask == 1].var().item() == pytest.approx(1, abs=1e-6)


def test_whitening_fewer_than_two_tokens_gives_zero():
    assert whiten(torch.tensor([[3.0, 4.0]]), torch.tensor([[1, 0]])).tolist() == [[0, 0]]
    assert whiten(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)).tolist() == [[0, 0]]


def test_reinforce_pp_by_hand():
    """Two answers of one token, rewards 1 and 0: ±0.5 over sqrt(0.5)."""
    one = torch.ones(2, 1)
    expected = torch.tensor([[0.5**0.5], [-(0.5**0.5)]])
    torch.testing.assert_close(reinforce_pp_advantages(torch.tensor([[1.0], [0.0]]), one), expected)
    found = reinforce_pp_baseline_advantages(torch.tensor([[1.0, 0.0]]), one)
    torch.testing.assert_close(found, expected)


def test_reinforce_pp_baseline_leaves_unscored_answers_out_of_the_statistics():
    mask = torch.ones(3, 2)
    found = reinforce_pp_baseline_advantages(torch.tensor([[1.0, NAN, 0.0]]), mask)
    expected = reinforce_pp_baseline_advantages(torch.tensor([[1.0, 0.0]]), mask[:2])
    torch.testing.assert_close(found[[0, 2]], expected)
    assert (found[1] == 0).all()
