"""A run whose rewards teach nothing ends, with the cause."""

from types import SimpleNamespace

import pytest

from posttrain.rewards.call import Scores
from posttrain.rollouts.options import (
    FLAT_GROUPS,
    FLAT_ROLLOUTS,
    LearningCheck,
    NothingToLearnError,
)


def rollout(values, failures=None):
    """A rollout with one reward; None is a completion without a score."""
    none = sum(value is None for value in values)
    totals = [float("nan") if value is None else value for value in values]
    scores = Scores(totals, {"judge": values}, 0, 0, none, failures or {})
    return SimpleNamespace(scores=scores, flat=values)


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ({"judge": "ValueError: down (judge.py, line 3)"}, "ValueError: down"),
        ({}, "it gave None, NaN or an infinite number"),
    ],
)
def test_without_any_reward_the_first_rollout_ends_the_run(failures, cause):
    check = LearningCheck(None, compares=True)
    with pytest.raises(NothingToLearnError, match=f"4 of 4 completions .*'judge': {cause}"):
        check.read([rollout([None] * 4, failures)], [False])


def test_a_share_may_be_set():
    half = [rollout([1.0, None, 0.0, None])]
    LearningCheck(None, compares=True).read(half, [True])
    LearningCheck(0.5, compares=True).read(half, [True])
    with pytest.raises(NothingToLearnError, match="2 of 4 completions"):
        LearningCheck(0.4, compares=True).read(half, [True])


@pytest.mark.parametrize("interrupted", [False, True])
def test_many_rollouts_without_a_difference_end_the_run(interrupted):
    check, same = LearningCheck(None, compares=True), [rollout([1.0, 1.0])]
    groups = -(-FLAT_GROUPS // FLAT_ROLLOUTS)
    for number in range(FLAT_ROLLOUTS - 1):
        check.read(same, [interrupted and number == 3] * groups)
    if interrupted:
        check.read(same, [False] * groups)
        return
    with pytest.raises(NothingToLearnError, match=f"in {FLAT_ROLLOUTS} rollouts in a row"):
        check.read(same, [False] * groups)


def test_a_few_groups_without_a_difference_are_chance():
    """One group a rollout: with hard problems most are flat."""
    check = LearningCheck(None, compares=True)
    for _ in range(FLAT_GROUPS - 1):
        check.read([rollout([0.0, 0.0])], [False])


def test_where_completions_are_not_compared_equal_rewards_are_no_reason():
    check = LearningCheck(None, compares=False)  # PPO
    for _ in range(2 * FLAT_ROLLOUTS):
        check.read([rollout([1.0])], [False])


def test_a_rollout_in_which_nothing_was_finished_says_nothing():
    """Partial rollouts: completions may take several."""
    LearningCheck(None, compares=True).read([], [])
