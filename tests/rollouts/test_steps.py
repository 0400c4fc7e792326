"""Process supervision: advantages of tokens from the rewards of the steps they belong to."""

import math

import pytest
import torch

from posttrain.advantages import process_advantages
from posttrain.rollouts.group import Group, arguments_of, assign_advantages
from posttrain.rollouts.sampling import Completion
from posttrain.rollouts.steps import StepAdvantages

NAN = math.nan


def test_by_hand():
    """Rewards 1, 0, 1, 1: mean 0.75, std 0.5. A token gets what is earned from its step on."""
    rewards = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
    found = process_advantages(rewards, eps=0.0)
    expected = torch.tensor([[[-1.0, -1.5], [1.0, 0.5]]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_deepseekmath_section_4_1_3_written_out():
    """R is all step rewards of the group; the advantage of t sums those with index(j) >= t."""
    generator = torch.Generator().manual_seed(0)
    ends = [[[1, 4], [0, 2, 3]], [[5], [2, 5]]]
    rewards = torch.full((2, 2, 6), NAN, dtype=torch.float64)
    for p, group in enumerate(ends):
        for g, places in enumerate(group):
            rewards[p, g, places] = torch.rand(len(places), generator=generator).double()
    found = process_advantages(rewards, eps=1e-9)
    for p, group in enumerate(ends):
        everything = torch.cat([rewards[p, g, places] for g, places in enumerate(group)])
        mean, std = everything.mean(), everything.std()
        for g, places in enumerate(group):
            for t in range(6):
                later = [(rewards[p, g, j] - mean) / std for j in places if j >= t]
                assert found[p, g, t].item() == pytest.approx(float(sum(later)), abs=1e-6)


def test_one_step_a_completion_is_grpo_and_equal_rewards_teach_nothing():
    from posttrain.advantages import group_advantages

    rewards = torch.tensor([[1.0, 0.0, 0.5]])
    steps = torch.cat((torch.full((1, 3, 2), NAN), rewards[..., None]), -1)
    expected = group_advantages(rewards)[..., None].expand(1, 3, 3)
    torch.testing.assert_close(process_advantages(steps), expected)
    assert (process_advantages(torch.full((1, 2, 4), 0.3)) == 0).all()


def completion(length):
    return Completion([7] * length, [0.0] * length, [0.0] * length, finish_reason="stop")


def test_each_group_gets_the_advantages_of_its_own_tokens_without_padding():
    groups = [
        Group({"prompt_ids": [3]}, [completion(3), completion(2)], torch.zeros(2)),
        Group({"prompt_ids": [4, 5]}, [completion(1), completion(4)], torch.zeros(2)),
    ]
    asked = []

    def steps(prompts, completions):
        asked.extend(zip(prompts, map(len, completions), strict=True))
        return [([0, 2], [1.0, 0.0]), ([1], [1.0]), ([0], [0.0]), ([1, 3], [0.0, 1.0])]

    advantage = StepAdvantages(steps)
    assert arguments_of(advantage) == ("groups",)
    assign_advantages(groups, advantage)
    assert asked == [([3], 3), ([3], 2), ([4, 5], 1), ([4, 5], 4)]
    lengths = [[len(row) for row in group.columns["advantages"]] for group in groups]
    assert lengths == [[3, 2], [1, 4]]
    first = process_advantages(torch.tensor([[[1.0, NAN, 0.0], [NAN, 1.0, NAN]]]))[0]
    torch.testing.assert_close(groups[0].columns["advantages"][0], first[0])
    torch.testing.assert_close(groups[0].columns["advantages"][1], first[1, :2])
    assert groups[0].advantages is None
