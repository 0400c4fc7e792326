"""Which prompts are started: how often each, which may be, and the same after resuming."""

import json

import pytest
import torch
from datasets import Dataset

from posttrain.errors import ConfigError, DataError
from posttrain.rollouts.options import PromptOrder
from posttrain.rollouts.prompts import (
    Curriculum,
    InOrderSampler,
    PrioritizedSampler,
    prompt_sampler,
    sampling_probabilities,
)
from tests.golden import load


def test_probabilities_match_the_golden_case():
    case = load("rollouts")["kimi_prioritized_sampling"]
    case.check_output(sampling_probabilities(case.success_rate), "prob")


def test_a_floor_brings_solved_prompts_back_and_1_makes_all_alike():
    """max(1 - s, 0.1) of 0.9, 0.5, 0, 1: 0.1, 0.5, 1, 0.1, of 1.7."""
    rates = torch.tensor([0.9, 0.5, 0.0, 1.0], dtype=torch.float64)
    found = sampling_probabilities(rates, floor=0.1)
    torch.testing.assert_close(found, torch.tensor([1, 5, 10, 1], dtype=torch.float64) / 17)
    assert sampling_probabilities(rates, floor=1.0).tolist() == [0.25] * 4


def sampler(count=6, **settings):
    return PrioritizedSampler(count, seed=0, **settings)


def test_prompts_are_taken_as_often_as_their_probability_says():
    """One of four at a time, 4,000 times, within 4 standard deviations of n p."""
    rates, count = [0.9, 0.5, 0.0, None], 4000
    one = sampler(4, success_rates=rates, prior=0.5, floor=0.1)
    found = torch.zeros(4)
    for rollout in range(count):
        (row,) = one.take(rollout, 1)
        one.report([(row, None)])
        found[row] += 1
    expected = torch.tensor([0.1, 0.5, 1.0, 0.5]) / 2.1
    assert (
        (found - count * expected).abs() <= 4 * (count * expected * (1 - expected)).sqrt()
    ).all()


def test_the_order_within_a_rollout_does_not_tell_hard_from_easy():
    """Both of two prompts, taken 400 times: the hard one comes first in half of them, within 4
    standard deviations of 10, so that no update of a rollout gets the harder prompts."""
    one, first = sampler(2, success_rates=[0.0, 0.9]), 0
    for rollout in range(400):
        taken = one.take(rollout, 2)
        one.report([(row, None) for row in taken])
        first += taken[0] == 0
    assert abs(first - 200) <= 40


def test_with_a_floor_of_1_success_changes_nothing():
    """Uniform sampling, whatever is known; with a lower floor the choices differ."""
    for floor, same in ((1.0, True), (0.1, False)):
        known = sampler(50, floor=floor, success_rates=[i / 50 for i in range(50)])
        unknown = sampler(50, floor=floor)
        pairs = [(known.take(r, 5), unknown.take(r, 5)) for r in range(5)]
        assert all(a == b for a, b in pairs) is same


def test_no_prompt_is_taken_twice_while_its_completions_are_unfinished():
    one = sampler(6)
    first, second = one.take(0, 3), one.take(1, 3)
    assert sorted(first + second) == list(range(6))
    with pytest.raises(
        ConfigError, match="expected 1 prompts without unfinished completions, found 0"
    ):
        one.take(2, 1)
    one.report([(first[1], 0.5)])
    assert one.take(2, 1) == [first[1]]


def test_the_latest_success_rate_counts_and_an_unknown_one_leaves_the_prior():
    one = sampler(3, success_rates=[None, 0.25, None], prior=0.75)
    assert one.rates.tolist() == [0.75, 0.25, 0.75]
    one.report([(0, 1.0), (1, None), (0, 0.5)])
    assert one.rates.tolist() == [0.5, 0.25, 0.75]
    assert one.metrics(0) == {"prompts_seen": 1 / 3}


def test_a_restored_sampler_takes_what_the_first_would_have():
    """In the middle of unfinished groups, through JSON; without the state it would not."""
    one, other, without = sampler(30), sampler(30), sampler(30)
    rows = one.take(0, 8)
    one.report([(row, i / 5) for i, row in enumerate(rows[:5])])
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    expected = one.take(1, 8)
    assert other.take(1, 8) == expected
    assert without.take(1, 8) != expected


def test_a_curriculum_admits_the_easiest_first_and_all_in_the_end():
    """Of ten prompts at rollout 0, 5 and 10 of 10: two, six, ten; row 9 is the easiest."""
    curriculum = Curriculum([10 - i for i in range(10)], rollouts=10)
    assert curriculum.admitted(0, at_least=1) == [9, 8]
    assert curriculum.admitted(5, at_least=1) == [9, 8, 7, 6, 5, 4]
    assert sorted(curriculum.admitted(10, at_least=1)) == list(range(10))
    assert curriculum.admitted(99, at_least=1) == curriculum.admitted(10, at_least=1)
    assert curriculum.admitted(0, at_least=3) == [9, 8, 7]
    one = PrioritizedSampler(10, seed=0, curriculum=curriculum)
    assert sorted(one.take(0, 2)) == [8, 9]
    assert sorted(one.take(1, 2)) == [6, 7]  # room is made for those that are being answered
    assert one.metrics(5)["curriculum_share"] == pytest.approx(0.6)


def test_in_order_is_the_order_of_ordinary_rollouts():
    order, one = PromptOrder(7, seed=3), InOrderSampler(7, seed=3)
    taken = [row for rollout in range(5) for row in one.take(rollout, 4)]
    assert taken == [order[i] for i in range(20)]


ROWS = {"prompt_ids": [[1]] * 3, "level": [3, 1, 2], "pass_rate": [0.5, 0.0, None]}


def test_difficulty_is_a_column_or_what_the_starting_model_fails():
    data = Dataset.from_dict(ROWS)
    by_level = prompt_sampler(data, seed=0, difficulty="level", curriculum_rollouts=4)
    assert by_level.curriculum.rows == [1, 2, 0]
    by_rate = prompt_sampler(data, seed=0, curriculum_rollouts=4)
    assert by_rate.curriculum.rows == [0, 1, 2]
    assert by_rate.rates.tolist() == [0.5, 0.0, 0.5]  # unknown: the prior
    assert prompt_sampler(data, seed=0).curriculum is None


def test_a_difficulty_that_is_missing_unused_or_no_number_is_refused():
    data = Dataset.from_dict(ROWS)
    with pytest.raises(ConfigError, match="no column 'levle'; it has level, pass_rate"):
        prompt_sampler(data, seed=0, difficulty="levle", curriculum_rollouts=4)
    with pytest.raises(ConfigError, match="is for a curriculum"):
        prompt_sampler(data, seed=0, difficulty="level")
    with pytest.raises(ConfigError, match="needs to know what is easy"):
        prompt_sampler(data.remove_columns("pass_rate"), seed=0, curriculum_rollouts=4)
    with pytest.raises(DataError, match="found 'hard' at prompt 2"):
        Curriculum([1.0, "hard"], rollouts=4)
    with pytest.raises(DataError, match="found 50 at prompt 2"):  # per cent
        sampler(2, success_rates=[None, 50])
    with pytest.raises(ConfigError, match=r"floor in \(0, 1\]"):
        sampler(floor=0.0)
