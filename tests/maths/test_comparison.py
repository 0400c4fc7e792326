"""Two passes around algebra, and the bound on what is left to it."""

import pytest

from posttrain.maths.comparison import MAX_PENDING, Comparison, Refused
from posttrain.maths.shapes import read_shape


def test_what_only_algebra_can_tell_is_decided_by_its_answers_in_a_second_pass():
    gold, answer = read_shape("x + 1"), read_shape("1 + x")
    first = Comparison()
    assert first.shapes(gold, answer) is None
    (pair,) = first.pending
    for is_equal in (True, False):
        assert Comparison({pair: is_equal}).shapes(gold, answer) is is_equal


def test_the_number_of_pairs_that_are_left_to_algebra_is_bounded():
    """Sets of n elements may need n * n pairs."""
    num_elements = next(n for n in range(100) if n * n > MAX_PENDING)
    gold = read_shape(r"\{" + ", ".join(f"x + {n}" for n in range(num_elements)) + r"\}")
    answer = read_shape(r"\{" + ", ".join(f"{n} + x" for n in range(num_elements)) + r"\}")
    with pytest.raises(Refused, match=f"over {MAX_PENDING} pairs"):
        Comparison().shapes(gold, answer)
