"""Advantages of completions and of tokens, from rewards with and without penalties of tokens."""

import math

import pytest
import torch

from posttrain.advantages import (
    group_advantages,
    leave_one_out_advantages,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
)
from posttrain.errors import ConfigError
from posttrain.rollouts import group as credit
from posttrain.rollouts.group import Group, assign_advantages
from posttrain.rollouts.sampling import Completion

ROOT_HALF = 0.5**0.5


def group(rewards, lengths):
    completions = [Completion([2] * n, [-1.0] * n, [-1.0] * n, "stop") for n in lengths]
    return Group({"prompt_ids": [5]}, completions, torch.tensor(rewards))


def assigned(groups, advantage, penalties=None):
    """What assign_advantages gives the groups, as numbers or lists of numbers."""
    if penalties is not None:
        penalties = [[torch.tensor(row) for row in group] for group in penalties]
    assign_advantages(groups, advantage, penalties)
    return [
        g.advantages.tolist()
        if g.advantages is not None
        else [row.tolist() for row in g.columns["advantages"]]
        for g in groups
    ]


def test_an_advantage_of_completions_gets_the_rewards_of_all_groups():
    groups = [group([1.0, 0.0], [1, 3]), group([0.5, 0.5], [2, 2])]
    assert assigned(groups, lambda r: r) == [[1.0, 0.0], [0.5, 0.5]]
    found = assigned(groups, group_advantages)
    assert found[0] == pytest.approx([ROOT_HALF, -ROOT_HALF], abs=1e-3)
    assert found[1] == [0, 0]


@pytest.mark.parametrize("advantage", [reinforce_pp_advantages, reinforce_pp_baseline_advantages])
def test_an_advantage_of_tokens_comes_as_one_number_a_token(advantage):
    """Answers of one token with rewards 1 and 0: +-0.5 over sqrt(0.5); a longer one has as many
    numbers as tokens, and a completion without a score zeros."""
    found = assigned([group([1.0, 0.0], [1, 1])], advantage)
    assert [a for completion in found[0] for a in completion] == pytest.approx(
        [ROOT_HALF, -ROOT_HALF]
    )
    (rows,) = assigned([group([1.0, 0.0, math.nan], [1, 3, 2])], advantage)
    assert [len(row) for row in rows] == [1, 3, 2]
    assert rows[1][0] == rows[1][1] == rows[1][2] < 0 < rows[0][0]
    assert rows[2] == [0, 0]


def test_whitened_advantages_of_tokens_have_mean_zero_over_the_batch():
    groups = [group([1.0, 0.2], [4, 1]), group([0.0, 0.7], [2, 5])]
    flat = [a for g in assigned(groups, reinforce_pp_advantages) for row in g for a in row]
    assert sum(flat) == pytest.approx(0, abs=1e-5)
    assert torch.tensor(flat).var().item() == pytest.approx(1, abs=1e-4)


def test_a_penalty_lowers_a_completions_reward_by_its_sum():
    """Rewards 1 and 0, of which the first loses 0.1 at each of two tokens: RLOO's +-0.8."""
    (found,) = assigned(
        [group([1.0, 0.0], [2, 1])], leave_one_out_advantages, [[[0.1, 0.1], [0.0]]]
    )
    assert found == pytest.approx([0.8, -0.8])


def test_a_penalty_counts_from_its_token_on_backwards():
    """Returns-to-go of -(0.5, 0.25) with a reward of 1 at the end: 0.25 and 0.75."""

    def returns(token_rewards, mask):
        assert mask.tolist() == [[True, True]]
        return token_rewards.flip(1).cumsum(1).flip(1)

    (found,) = assigned([group([1.0], [2])], returns, [[[0.5, 0.25]]])
    assert found[0] == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("advantage", [group_advantages, reinforce_pp_advantages])
def test_two_ranks_see_the_statistics_of_both(advantage, monkeypatch):
    groups = [group([1.0, 0.2], [4, 1]), group([0.0, 0.7], [2, 5])]
    whole = assigned(groups, advantage)
    padded = [[torch.zeros(len(c.token_ids)) for c in g.completions] for g in groups]
    everyone = [([g.rewards], [p]) for g, p in zip(groups, padded, strict=True)]
    monkeypatch.setattr(credit, "from_all_ranks", lambda _mine: everyone)
    monkeypatch.setattr(credit, "rank_and_world", lambda: (1, 2))
    assert assigned(groups[1:], advantage) == whole[1:]


def test_an_advantage_of_anything_else_is_refused():
    with pytest.raises(ConfigError, match=r"expected f\(rewards\) or .*f\(rewards, lengths\)"):
        assigned([group([1.0], [1])], lambda rewards, lengths: rewards + lengths)
