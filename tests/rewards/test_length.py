"""Length rewards against their golden cases, and how they group and count."""

from functools import partial

import pytest

from posttrain.rewards.length import (
    kimi_length,
    kimi_length_reward,
    kimi_length_warmup,
    soft_overlong_penalty,
    soft_overlong_reward,
)
from posttrain.rewards.math import verify_math

# Golden case dapo_soft_overlong_penalty: L_max 100, L_cache 20.
DAPO_SOFT_OVERLONG = [
    (10, 0.0),
    (80, 0.0),
    (81, -0.05),
    (90, -0.5),
    (100, -1.0),
    (101, -1.0),
    (150, -1.0),
]

# Golden case kimi_length_reward: lengths, correct, reward.
KIMI_LENGTH_REWARD = [
    ([100, 200, 300, 400], [True, False, True, False], [0.5, 0.0, -0.16666666666666663, -0.5]),
    ([50, 50, 50], [True, False, True], [0.0, 0.0, 0.0]),
    ([10, 1000, 505], [False, False, True], [0.0, -0.5, 0.0]),
]

# Golden case kimi_length_warmup: step, total of reward 1 and length reward -0.25; t0 3, weight 0.5.
KIMI_LENGTH_WARMUP = [(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.875), (4, 0.875), (5, 0.875)]


@pytest.mark.parametrize(("num_tokens", "penalty"), DAPO_SOFT_OVERLONG)
def test_soft_overlong_penalty_matches_the_golden_case(num_tokens, penalty):
    found = soft_overlong_penalty(num_tokens, max_tokens=100, cache_tokens=20)
    assert found == pytest.approx(penalty, abs=1e-12)


@pytest.mark.parametrize("cache_tokens", [0, -1, 101])
def test_a_slope_without_width_is_refused(cache_tokens):
    with pytest.raises(ValueError, match="cache_tokens"):
        soft_overlong_penalty(10, max_tokens=100, cache_tokens=cache_tokens)


def test_the_overlong_reward_counts_tokens_not_characters():
    reward = partial(soft_overlong_reward, max_tokens=100, cache_tokens=20)
    assert reward(["x" * 500, "x"], completion_ids=[[7] * 80, [7] * 90]) == [0.0, -0.5]


@pytest.mark.parametrize(("num_tokens", "correct", "reward"), KIMI_LENGTH_REWARD)
def test_kimi_length_reward_matches_the_golden_case(num_tokens, correct, reward):
    assert kimi_length_reward(num_tokens, correct) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize(("step", "total"), KIMI_LENGTH_WARMUP)
def test_kimi_length_warmup_matches_the_golden_case(step, total):
    assert 1.0 + kimi_length_warmup(step, start_step=3, weight=0.5) * -0.25 == total


def kimi_call(prompts, lengths, answers, golds, **options):
    return kimi_length(
        [rf"\boxed{{{answer}}}" for answer in answers],
        prompts=prompts,
        completion_ids=[[7] * length for length in lengths],
        answer=golds,
        **options,
    )


def test_kimi_length_compares_only_answers_to_one_prompt():
    """The golden case's first and third group in one call give each group's own numbers."""
    found = kimi_call(
        ["a"] * 4 + ["b"] * 3,
        [100, 200, 300, 400, 10, 1000, 505],
        [1, 0, 1, 0, 0, 0, 2],
        ["1"] * 4 + ["2"] * 3,
    )
    expected = KIMI_LENGTH_REWARD[0][2] + KIMI_LENGTH_REWARD[2][2]
    assert found == pytest.approx(expected, abs=1e-12)


def test_kimi_length_has_no_score_where_the_gold_cannot_be_read():
    assert kimi_call(["a", "a", "b", "b"], [1, 2, 1, 2], [1] * 4, ["", "", "1", "1"]) == [
        None,
        None,
        0.5,
        -0.5,
    ]


def test_kimi_length_takes_the_verifier_of_the_accuracy_reward():
    prefilled = partial(verify_math, prefilled_think=True)
    assert kimi_call(["a"] * 2, [1, 2], [1, 1], ["1", "1"]) == [0.5, -0.5]
    assert kimi_call(["a"] * 2, [1, 2], [1, 1], ["1", "1"], verify=prefilled) == [0.0, -0.5]
