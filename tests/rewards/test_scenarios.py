"""Rewards of some rows only, and the rules of general prompts."""

from functools import partial

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards.call import Scoring, check_rewards, score
from posttrain.rewards.checks import find_unscorable
from posttrain.rewards.math import math_reward
from posttrain.rewards.scenarios import avoids_words, reward_where, think_answer_or_plain

ON_PROBLEMS = partial(reward_where, reward=math_reward, column="kind", value="reasoning")
KINDS = ["reasoning", "reasoning", "general", "general"]
TEXTS = ["<answer>7</answer>", "<answer>8</answer>", "<answer>7</answer>", "hello"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_reward_scores_the_rows_of_its_kind_and_gives_the_others_zero(num_workers):
    found = score(
        {"accuracy": (ON_PROBLEMS, 1.0)}, TEXTS, prompts=["a", "a", "b", "b"],
        completion_ids=[[1]] * 4, columns={"kind": KINDS, "answer": ["7", "7", "none", "none"]},
        scoring=Scoring(num_workers=num_workers),
    )  # fmt: skip
    assert found.totals == [1.0, 0.0, 0.0, 0.0]


def test_a_kind_without_rows_calls_nothing():
    assert reward_where(["a"], reward=None, column="kind", value="x", kind=["y"]) == [0.0]


def test_a_row_of_the_kind_that_cannot_be_scored_is_found_and_the_others_are_not():
    columns = {"kind": ["general", "reasoning", "reasoning"], "answer": ["", "7", ""]}
    found = find_unscorable({"accuracy": (ON_PROBLEMS, 1.0)}, columns)
    assert list(found) == [2]
    assert find_unscorable({"accuracy": (math_reward, 1.0)}, columns).keys() == {0, 2}


def test_the_column_of_the_reward_within_is_missed_before_training():
    with pytest.raises(ConfigError, match="needs 'answer', and the data has no such column"):
        check_rewards({"accuracy": (ON_PROBLEMS, 1.0)}, ["kind", "gold"])


def test_a_general_answer_may_do_without_a_thought_and_not_with_half_of_one():
    texts = ["Welcome.", "<think>a</think><answer>b</answer>", "<think>a</think>b", " ", "</think>"]
    assert think_answer_or_plain(texts) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_harmful_word_counts_wherever_it_stands_and_only_as_a_word():
    texts = ["<think>a FOOL</think><answer>Welcome</answer>", "foolish", "Hello"]
    assert avoids_words(texts, words=["fool"]) == [0.0, 1.0, 1.0]
