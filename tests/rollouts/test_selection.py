"""Dynamic sampling and overlong filtering: which groups and completions train."""

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.rewards.call import Scores
from posttrain.rollouts.group import Rollout, has_signal
from posttrain.rollouts.options import RolloutOptions, Selection
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.rollouts.source import REFILL_POSITION, Rollouts
from tests.rollouts.sources import bind, take
from tests.trainers.tiny import even_share, prompts

NAN = float("nan")


def test_a_signal_is_a_difference_between_scored_completions():
    rewards = torch.tensor([[1.0, 1.0], [1.0, 0.0], [NAN, 0.0], [NAN, NAN], [0.5, 0.5]])
    assert has_signal(rewards).tolist() == [False, True, False, False, False]


def fixed_rewards(differ, *, finish=("stop", "stop"), accuracy=None):
    """A roll_out whose prompt i gets rewards (1, 0) where differ(seed), else (1, 1)."""
    calls = []

    def roll_out(rows, seeds, **_):
        calls.append(list(seeds))
        if not rows:
            return None
        values = [v for seed in seeds for v in ((1.0, 0.0) if differ(seed) else (1.0, 1.0))]
        parts = {"accuracy": [accuracy] * len(values) if accuracy is not None else values}
        completions = [
            [Completion([5, 1], [-1.0, -1.0], [-0.5, -0.5], reason) for reason in finish]
            for _ in rows
        ]
        scores = Scores(values, parts, 0, 0, 0, {})
        return Rollout(rows, completions, [], scores, torch.tensor(values).view(len(rows), 2))

    return roll_out, calls


def source(roll_out, selection, *, accumulation=2, **rank):
    made = Rollouts(
        prompts(8), {"accuracy": (even_share, 1.0)}, Sampling(4, (1,)), num_generations=2,
        advantage=lambda rewards: rewards - rewards.mean(1, True),
        options=RolloutOptions(selection=selection),
    )  # fmt: skip
    made.roll_out = roll_out
    return bind(made, accumulation=accumulation, **rank)


def batches(roll_out, selection, *, noted=None):
    made = source(roll_out, selection)
    if noted is not None:
        made.note = noted.append
    return take(made, 2)


def test_groups_of_equal_rewards_are_replaced_and_the_batch_keeps_its_size():
    """Of the four first prompts two have equal rewards, of their two refills one; a third fills."""
    first_refill = REFILL_POSITION
    roll_out, calls = fixed_rewards(lambda seed: seed not in (1, 2, first_refill))
    noted = []
    found = batches(roll_out, Selection(max_refills=3), noted=noted)
    assert [len(batch) for batch in found] == [2, 2]
    assert all(group.advantages.tolist() == [0.5, -0.5] for batch in found for group in batch)
    assert calls == [[0, 1, 2, 3], [first_refill, first_refill + 1], [first_refill + 4]]
    assert len(noted) == 3  # every completion that was sampled is in the metrics


def test_the_number_of_rounds_is_bounded_and_groups_of_equal_rewards_fill_up():
    roll_out, calls = fixed_rewards(lambda seed: seed == 3)
    found = batches(roll_out, Selection(max_refills=2))
    advantages = [group.advantages.tolist() for batch in found for group in batch]
    assert advantages == [[0.5, -0.5]] + [[0.0, 0.0]] * 3
    assert len(calls) == 3


def test_without_refills_nothing_more_is_sampled():
    roll_out, calls = fixed_rewards(lambda _: False)
    assert len(batches(roll_out, Selection())[0]) == 2
    assert len(calls) == 1


def test_the_rewards_that_must_differ_may_be_those_of_one_function():
    """The totals differ, through a length penalty say, and the accuracies do not."""
    roll_out, calls = fixed_rewards(lambda _: True, accuracy=1.0)
    batches(roll_out, Selection(max_refills=1, signal_of="accuracy"))
    assert len(calls) == 2
    roll_out, calls = fixed_rewards(lambda _: True, accuracy=1.0)
    batches(roll_out, Selection(max_refills=1))
    assert len(calls) == 1


def test_no_refill_comes_twice_nor_in_two_rollouts_ranks_or_rounds():
    seen = []
    for rank in (0, 1):
        roll_out, calls = fixed_rewards(lambda _: False)
        made = source(roll_out, Selection(max_refills=3), accumulation=1, rank=rank, world_size=2)
        take(made, 3)
        seen += [seed for seeds in calls for seed in seeds]
    assert len(seen) == len(set(seen)) == 2 * 3 * (2 + 3 * 2)


def test_cut_completions_count_in_the_statistics_and_do_not_train():
    roll_out, _ = fixed_rewards(lambda _: True, finish=("stop", "length"))
    (group, _), _ = batches(roll_out, Selection(drop_truncated=True))
    assert group.advantages.tolist() == [0.5]  # of a group of two: the mean is 0.5
    assert len(group.completions) == len(group.columns["policy_logps"]) == 1


def test_where_every_completion_was_cut_a_group_stays_at_advantage_0():
    roll_out, _ = fixed_rewards(lambda _: True, finish=("length", "length"))
    (batch, _) = batches(roll_out, Selection(drop_truncated=True))
    assert [group.advantages.tolist() for group in batch] == [[0.0, 0.0]]


def test_a_negative_number_of_refills_is_refused():
    with pytest.raises(ConfigError, match="at least 0, found -1"):
        Selection(max_refills=-1)
