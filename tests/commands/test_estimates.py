"""pass@k and best of k are means over all subsets, maj@k over windows; intervals as published."""

import itertools
import math
import random
from statistics import mean

import pytest

from posttrain.commands.estimates import (
    Problem,
    best_of_k,
    estimates,
    majority_at_k,
    over_problems,
    pass_at_k,
    table,
    wilson_interval,
)
from posttrain.errors import DataError

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.25]
SCORES = [0.3, 0.3, 0.9, -2.0, 0.1, 0.9]  # two ties


def test_by_hand():
    """1 - C(3, 2) / C(4, 2) = 0.5; of (3, 2, 1) the second is best of one pair in three."""
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert best_of_k([3, 2, 1], [0.0, 1.0, 0.0], 2) == pytest.approx(1 / 3)
    assert [majority_at_k([0, 1, 1], [1.0, 0.0, 0.0], k) for k in (1, 2, 3)] == pytest.approx(
        [1 / 3, 1 / 3, 0.0]
    )


@pytest.mark.parametrize("k", range(1, 7))
def test_they_are_means_over_all_subsets(k):
    """Equal best scores are drawn by lot: a subset counts with the mean reward of its best."""
    subsets = list(itertools.combinations(range(6), k))
    right = [REWARDS[i] == 1 for i in range(6)]
    found = pass_at_k(6, sum(right), k)
    assert found == pytest.approx(mean(any(right[i] for i in s) for s in subsets), abs=1e-12)

    def of_best(subset):
        top = max(SCORES[i] for i in subset)
        return mean(REWARDS[i] for i in subset if SCORES[i] == top)

    expected = mean(map(of_best, subsets))
    assert best_of_k(SCORES, REWARDS, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_does_not_overflow_and_is_not_the_biased_estimate():
    """From 10,000 samples; golden value by the product of Codex's figure 3, in float64."""
    product = math.prod(1 - 100 / i for i in range(10_000 - 3 + 1, 10_000 + 1))
    assert pass_at_k(10_000, 3, 100) == pytest.approx(1 - product, rel=1e-9)
    assert pass_at_k(4, 1, 2) > 1 - (1 - 1 / 4) ** 2
    assert (pass_at_k(8, 0, 8), pass_at_k(8, 1, 8)) == (0, 1)


def test_k_of_one_is_mean_accuracy_and_the_oracle_s_best_is_pass_at_k():
    right = [float(reward == 1) for reward in REWARDS]
    for k in range(1, 7):
        assert best_of_k(right, right, k) == pytest.approx(pass_at_k(6, 2, k), abs=1e-12)
    votes = [0, 1, 1, 0, None, 2]
    assert best_of_k(SCORES, REWARDS, 1) == pytest.approx(mean(REWARDS))
    assert majority_at_k(votes, REWARDS, 1) == pytest.approx(mean(REWARDS))


def test_a_tie_goes_to_the_answer_sampled_first_and_no_answer_has_no_vote():
    """All four rotations of A, A, B, B: A leads in three of them, B in the one that starts at B B,
    and B, B, A, A; A, B, B, A and B, A, A, B start with each once."""
    rewards = [1.0, 1.0, 0.0, 0.0]
    assert majority_at_k([0, 0, 1, 1], rewards, 4) == pytest.approx(0.5)
    assert majority_at_k([0, 0, 1, 1], rewards, 2) == pytest.approx(0.5)
    assert majority_at_k([None, None, None, 0], [0.0, 0.0, 0.0, 1.0], 4) == 1.0
    assert majority_at_k([None] * 4, rewards, 3) == pytest.approx(0.5)


def test_maj_at_k_is_without_bias():
    """Over random draws its mean is that of k fresh samples, voted once."""
    draw, probabilities = random.Random(0), (0.5, 0.3, 0.2)

    def sample(count):
        votes = draw.choices(range(3), probabilities, k=count)
        return votes, [float(vote == 0) for vote in votes]

    windows = mean(majority_at_k(*sample(8), 5) for _ in range(4000))

    def once():
        votes, rewards = sample(5)
        return majority_at_k(votes, rewards, 5)

    assert windows == pytest.approx(mean(once() for _ in range(4000)), abs=0.025)


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_of_the_samples_is_refused(k):
    for call in (
        lambda: pass_at_k(4, 1, k),
        lambda: best_of_k(SCORES[:4], REWARDS[:4], k),
        lambda: majority_at_k([0] * 4, REWARDS[:4], k),
    ):
        with pytest.raises(ValueError, match=rf"k: expected 1 to 4, .*; found {k}"):
            call()


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (1, 29, 0.0061, 0.1718), (29, 29, 0.8830, 1.0)],
)  # fmt: skip
def test_wilson_golden(right, total, low, high):
    """Newcombe (1998), Statistics in Medicine 17, table I, method 3; the last by symmetry."""
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_is_over_problems():
    """(0, 0.5, 1): s = 0.5, 1.95996 · 0.5 / sqrt(3) = 0.5658. Of 0 and 1 alone it is Wilson's."""
    found = over_problems("x", [0.0, 0.5, 1.0])
    assert found[1:] == (0.5, pytest.approx(-0.0658, abs=1e-4), pytest.approx(1.0658, abs=1e-4),
                         "normal")  # fmt: skip
    assert over_problems("x", [1.0, 0.0])[2:] == (*wilson_interval(1, 2), "Wilson")
    assert math.isnan(over_problems("x", [0.5]).low)


def problem(accuracy, score):
    return Problem({"accuracy": accuracy, "score": score}, [2, 2], [0, 1])


def test_problems_that_could_not_be_scored_are_left_out_and_counted():
    problems = [
        problem([1.0, 0.0], [0.1, 0.2]),
        problem([1.0, None], [0.1, 0.2]),
        problem([1.0, 1.0], [None, 0.2]),
        problem([1.0, 1.0], [0.3, 0.2]),
    ]
    shown = table(problems, [2])
    assert " 2, samples of each: 2, 2 left out: a sample could not be scored" in f" {shown[0][24:]}"
    found = {e.name: e.value for e in estimates([problems[0], problems[3]], [2])}
    expected = {"accuracy": 0.75, "pass@2": 1.0, "maj@2": 0.75, "best_of_2": 0.5}
    assert found == pytest.approx({**expected, "mean_completion_tokens": 2.0})
    assert shown[1].startswith("accuracy                75.0%")
    with pytest.raises(DataError, match="none among 1"):
        table(problems[1:2], [2])
