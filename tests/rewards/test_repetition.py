"""Repeated n-grams: by hand, their limits, TRL's numbers, and time."""

import random

import pytest

from posttrain.rewards.repetition import (
    ends_in_loop,
    loop_penalty,
    ngram_repetition,
    repetition_penalty,
)
from tests.deadline import deadline


@pytest.mark.parametrize(
    ("token_ids", "ngram_size", "share"),
    [
        ([1, 2, 3, 1, 2, 3], 3, 0.25),  # 123 231 312 123
        ([1, 2, 3, 4, 5, 6], 3, 0.0),
        ([5, 5, 5, 5, 5], 2, 0.75),  # 55, four times
        ([5, 5, 5, 5, 5], 5, 0.0),
        ([1, 2, 1, 2], 1, 0.5),
        ([1, 2, 3, 2, 1], 2, 0.0),  # 23 is not 32
        ([1, 12, 11, 2], 2, 0.0),  # nor is 1 12 the same as 11 2
        ([1, 2], 3, 0.0),
        ([], 1, 0.0),
    ],
)
def test_the_share_of_ngrams_that_were_there_before(token_ids, ngram_size, share):
    assert ngram_repetition(token_ids, ngram_size=ngram_size) == share


def test_a_loop_comes_near_1_and_never_reaches_it():
    """Of 998 trigrams in a loop of two tokens, two are distinct."""
    assert ngram_repetition([1, 2] * 500, ngram_size=3) == 1 - 2 / 998


def test_tokens_appended_to_what_is_new_never_lower_the_number_of_repeats():
    ids = random.Random(0).choices(range(9), k=200)
    repeats = [round(ngram_repetition(ids[:n], ngram_size=2) * (n - 1)) for n in range(2, 200)]
    assert repeats == sorted(repeats)
    assert repeats[-1] > 100  # of 81 possible pairs


@pytest.mark.parametrize("ngram_size", [0, -1])
def test_an_ngram_of_nothing_is_refused(ngram_size):
    with pytest.raises(ValueError, match="at least 1"):
        ngram_repetition([1, 2], ngram_size=ngram_size)


def test_the_penalty_reads_token_ids_and_no_text():
    ids = [[1, 2, 3, 4], [5] * 5]
    found = repetition_penalty(["a a a a", "a"], completion_ids=ids, ngram_size=3)
    assert found == [0.0, pytest.approx(-2 / 3)]


def test_by_default_a_phrase_may_come_back_and_a_loop_or_a_copied_passage_may_not():
    phrase, new = [1, 2, 3, 4, 5], iter(range(100, 1000))
    sentences = [phrase + [next(new) for _ in range(15)] for _ in range(10)]
    texts = [[token for sentence in sentences for token in sentence], phrase * 40, [*range(40)] * 2]
    spared, looped, copied = repetition_penalty([""] * 3, completion_ids=texts)
    assert spared == 0.0
    assert looped < -0.97  # 5 of 181
    assert copied == pytest.approx(-21 / 61)


def test_the_penalty_agrees_with_trls():
    rewards = pytest.importorskip("trl.rewards")
    draw = random.Random(0)
    ids = [draw.choices(range(7), k=draw.randrange(40)) for _ in range(50)]
    for size in (1, 2, 3, 20):
        theirs = rewards.get_repetition_penalty_reward(ngram_size=size)(completion_ids=ids)
        ours = repetition_penalty([""] * 50, completion_ids=ids, ngram_size=size)
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_a_hundred_thousand_tokens_are_counted_and_never_hang():
    with deadline(30):
        assert ngram_repetition([1] * 100_000, ngram_size=20) > 0.99
        assert ngram_repetition(list(range(100_000)), ngram_size=20) == 0.0


@pytest.mark.parametrize(
    ("token_ids", "num_tokens", "loops"),
    [
        ([1, 2, 3, 2, 3, 2, 3], 6, True),
        ([1, 2, 3, 2, 3, 2, 3], 7, False),  # the 1 belongs to no copy
        ([9, 2, 3, 2, 3, 2, 3, 2], 7, True),  # the last copy is cut short
        ([5, 5, 5], 3, True),
        ([5, 5], 3, False),  # too short to say
        ([1, 2, 3, 1, 2, 3], 6, False),  # twice is no loop
        ([1, 2, 1, 2, 1, 3], 6, False),
        ([4, 4, 4, 4, 4, 4, 1], 6, False),  # it came out of it
    ],
)
def test_an_answer_ends_in_a_loop_if_its_last_tokens_are_three_copies(token_ids, num_tokens, loops):
    assert ends_in_loop(token_ids, num_tokens=num_tokens) is loops
    (penalty,) = loop_penalty(["x"], completion_ids=[token_ids], num_tokens=num_tokens)
    assert penalty == (-1.0 if loops else 0.0)


def test_a_count_that_goes_on_is_no_loop():
    steps = [token for n in range(50) for token in (1, n, 2)]
    assert not ends_in_loop(steps, num_tokens=60)
    assert ends_in_loop([1, 7, 2] * 50, num_tokens=60)


def test_fewer_tokens_than_copies_are_refused():
    with pytest.raises(ValueError, match="found min_copies=3, num_tokens=2"):
        ends_in_loop([1, 2], num_tokens=2)
