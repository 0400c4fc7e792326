"""Rewards and the rows of their data are checked before the run."""

from functools import partial

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards.call import with_messages
from posttrain.rewards.checks import check_rewards, find_unscorable
from posttrain.rewards.format import think_answer_format
from posttrain.rewards.length import kimi_length, soft_overlong_reward
from posttrain.rewards.math import math_reward


@pytest.mark.parametrize("gates", [{"short": "corect"}, {"shrt": "correct"}, {"short": "short"}])
def test_gates_that_name_no_two_rewards_are_refused(gates):
    rewards = {"correct": (math_reward, 1.0), "short": (think_answer_format, 1.0)}
    check_rewards(rewards, ["answer"], {"short": "correct"})
    with pytest.raises(ConfigError, match="names of two rewards; there are correct, short"):
        check_rewards(rewards, ["answer"], gates)


def misspelt(completions, *, anwser, **_columns):
    return [float(gold == text) for gold, text in zip(anwser, completions, strict=True)]


def test_a_misspelt_column_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError) as raised:
        check_rewards({"correct": (misspelt, 1.0)}, ["prompt", "answer", "level"])
    message = str(raised.value)
    assert "reward 'correct' (misspelt) needs 'anwser'" in message
    assert "Nearest: 'answer'." in message
    assert "Columns found: prompt, answer, level." in message


def test_a_limit_that_was_not_bound_is_an_error_and_binding_it_mends_it():
    with pytest.raises(ConfigError, match=r"functools.partial\(soft_overlong_reward, max_tokens="):
        check_rewards({"short": (soft_overlong_reward, 1.0)}, ["answer"])
    bound = partial(soft_overlong_reward, max_tokens=100, cache_tokens=20)
    check_rewards({"short": (bound, 1.0)}, [])


def test_every_reward_of_ours_is_satisfied_by_the_column_answer():
    rewards = {
        "correct": (math_reward, 1),
        "format": (think_answer_format, 0.1),
        "length": (kimi_length, 0.1),
    }
    check_rewards(rewards, ["prompt", "answer"])
    with pytest.raises(ConfigError, match="'correct'"):
        check_rewards(rewards, ["prompt", "solution"])


def by_position(completions, /):
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "weight other than 0"),
        ({"a": (math_reward, 0.0)}, "weight other than 0"),
        ({"a": math_reward}, "expected a pair"),
        ({"a": ("math_reward", 1.0)}, "expected a pair"),
        ({"a": (math_reward, "1")}, "finite weight, found '1'"),
        ({"a": (math_reward, float("nan"))}, "finite weight, found nan"),
        ({"a": (by_position, 1.0)}, "can only be given by position"),
    ],
)
def test_rewards_that_cannot_work_are_refused(rewards, message):
    with pytest.raises(ConfigError, match=message):
        check_rewards(rewards, ["answer"])


def test_the_required_columns_of_a_wrapped_reward_are_still_checked():
    with pytest.raises(ConfigError, match="needs 'anwser'"):
        check_rewards({"correct": (with_messages(misspelt), 1.0)}, ["answer"])


def test_what_a_partial_binds_reaches_the_check_of_the_rows():
    def by_level(completions, *, level, limit=1, **_columns):
        return [float(n <= limit) for n, _ in zip(level, completions, strict=True)]

    def too_high(level, limit=1):
        return [(row, f"level {n}") for row, n in enumerate(level) if n > limit]

    by_level.find_unscorable = too_high
    levels = {"level": [1, 2, 3]}
    assert find_unscorable({"r": (by_level, 1.0)}, levels) == {1: "r: level 2", 2: "r: level 3"}
    bound = partial(partial(by_level, limit=1), limit=2)
    assert find_unscorable({"r": (bound, 1.0)}, levels) == {2: "r: level 3"}
