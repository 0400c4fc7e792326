"""Numbers, units and bases: read exactly, or not at all."""

from fractions import Fraction

from posttrain.maths.numerals import (
    MAX_UNIT_CHARS,
    read_number,
    same_number,
    split_base,
    split_unit,
    units_agree,
)
from tests.cases import read_cases


def test_numerals_are_read_exactly_or_not_at_all():
    for case in read_cases(__file__, "numerals", kind="number"):
        value = None if case["value"] is None else Fraction(case["value"])
        assert read_number(case["text"]) == value, case


def test_two_numbers_are_the_same_exactly_but_for_percent_commas_and_full_doubles():
    for case in read_cases(__file__, "numerals", kind="same"):
        assert same_number(case["gold"], case["answer"]) is case["is_same"], case


def test_a_tolerance_holds_only_where_it_is_asked_for():
    assert same_number("3.14159", "3.14", relative_tolerance=1e-3)
    assert not same_number("3.14159", "3.14", relative_tolerance=1e-5)
    assert not same_number("3.14159", "3.14")


def test_a_unit_is_told_from_a_variable():
    for case in read_cases(__file__, "numerals", kind="unit"):
        assert split_unit(case["text"]) == (case["value"], case["unit"]), case


def test_units_agree_where_one_is_missing_or_part_of_the_other():
    assert units_agree("", "cm")
    assert units_agree("apple", "red apple")
    assert not units_agree("cm", "m")
    assert not units_agree("apple", "orange")


def test_a_numeral_may_carry_its_base():
    for case in read_cases(__file__, "numerals", kind="base"):
        assert split_base(case["text"]) == (case["base"] and tuple(case["base"])), case


def test_the_tolerance_is_relative_to_the_size_of_the_gold_whatever_its_sign():
    assert same_number("-200", "-199", relative_tolerance=1e-2)
    assert same_number("-200", "-201", relative_tolerance=1e-2)
    assert not same_number("-200", "-190", relative_tolerance=1e-2)


def test_a_text_beyond_the_limit_is_not_searched_for_a_unit():
    """The search takes time quadratic in the length."""
    for length, unit in ((MAX_UNIT_CHARS, "apple"), (MAX_UNIT_CHARS + 1, "")):
        text = "9" * (length - len(" apples")) + " apples"
        assert split_unit(text)[1] == unit
