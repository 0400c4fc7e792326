"""The rules on a handful of completions, by hand, and what no rule may depend on."""

import itertools

import pytest

from posttrain.selection.rules import (
    Completions,
    all_correct,
    best,
    best_against_worst,
    first_of_equals,
    shortest_against_longer,
    shortest_correct,
)

# Golden cases kimi_shortest_rejection_sampling and kimi_long2short_dpo_pairs.
LENGTHS = [120, 90, 100, 150, 140, 80, 400, 134]
CORRECT = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]


def judged(rewards, lengths):
    """Completions that are right from reward 1 on."""
    return Completions(rewards, lengths, [reward >= 1 for reward in rewards])


def test_shortest_rejection_sampling_matches_the_golden_case():
    assert shortest_correct(judged(CORRECT, LENGTHS)) == [2]


def test_long2short_pairs_match_the_golden_case():
    assert shortest_against_longer(judged(CORRECT, LENGTHS)) == [(2, 3), (2, 6)]


def test_the_bounds_of_long2short_pairs():
    """Chosen has 100 tokens: a right one is rejected from 150 on, a wrong one from 101."""
    lengths = [100, 149, 150, 99, 100, 101]
    completions = judged([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], lengths)
    assert shortest_against_longer(completions) == [(0, 2), (0, 5)]
    assert shortest_against_longer(completions, ratio=1.49) == [(0, 1), (0, 2), (0, 5)]


def test_best_is_the_highest_right_reward_and_the_first_of_equals():
    assert best(judged([0.2, 1.2, 1.0, 1.2], [9, 9, 1, 1])) == [1]
    assert best(Completions([-3.0, -1.5], [1, 1], [True, True])) == [1]


def test_a_wrong_completion_is_never_chosen_however_high_its_reward():
    """Wrong but well-formed 1, right but cut short 0.75, wrong 0."""
    completions = Completions([1.0, 0.75, 0.0], [5, 5, 9], [False, True, False])
    for rule in (best, shortest_correct, all_correct):
        assert rule(completions) == [1]
    for rule in (best_against_worst, shortest_against_longer):
        assert rule(completions) == [(1, 2)]


def test_all_correct_keeps_the_first_ones_up_to_the_limit():
    rewards = [1, 0, 1, 1, 1, 1]
    assert all_correct(judged(rewards, [5, 1, 4, 3, 2, 1]), limit=3) == [0, 2, 3]
    assert all_correct(judged(rewards, [1] * 6)) == [0, 2, 3, 4]


@pytest.mark.parametrize("rule", [best, shortest_correct, all_correct, shortest_against_longer])
def test_without_a_right_completion_nothing_is_kept(rule):
    assert rule(Completions([0.99, 0.2], [1, 2], [False, False])) == []
    assert rule(Completions([], [], [])) == []
    assert rule(Completions([0.99, 0.2], [1, 2], [True, False])) != []


def test_best_against_worst_wants_a_right_completion_and_a_margin():
    """1.25 - 0.25 = 1 between the best and the worst."""
    completions = judged([0.25, 1.25, 0.25], [1, 1, 1])
    assert best_against_worst(completions) == [(1, 0)]
    assert best_against_worst(completions, min_margin=1.0) == [(1, 0)]
    assert best_against_worst(completions, min_margin=1.01) == []
    assert best_against_worst(judged([0.0, 0.9], [1, 1])) == []
    assert best_against_worst(judged([1.0, 1.0], [1, 1]), min_margin=0.0) == []
    assert best_against_worst(judged([], [])) == []


def test_where_no_two_completions_tie_the_order_of_sampling_does_not_matter():
    completions = [(1.3, 40), (1.1, 20), (0.2, 50), (0.1, 70), (1.2, 30)]
    for shuffled in itertools.permutations(completions):
        sampled = judged(*zip(*shuffled, strict=True))
        assert [shuffled[i] for i in best(sampled)] == [(1.3, 40)]
        assert [shuffled[i] for i in shortest_correct(sampled)] == [(1.1, 20)]
        ((chosen, rejected),) = best_against_worst(sampled)
        assert (shuffled[chosen], shuffled[rejected]) == ((1.3, 40), (0.1, 70))
        pairs = shortest_against_longer(sampled)
        assert {shuffled[chosen] for chosen, _ in pairs} == {(1.1, 20)}
        longer = {shuffled[rejected] for _, rejected in pairs}
        assert longer == {(1.3, 40), (0.2, 50), (0.1, 70), (1.2, 30)}


def test_repetitions_are_texts_that_differ_in_white_space_around_them_at_most():
    assert first_of_equals(["a", " a\n", "b", "a b", "a  b", "b"]) == [0, 2, 3, 4]
