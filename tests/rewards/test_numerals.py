"""Numbers, units and spelling: exact, or not at all."""

from fractions import Fraction

import pytest

from posttrain.maths.normalise import normalise
from posttrain.maths.numerals import read_number, same_number, split_base, split_unit, units_agree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("007", Fraction(7)),
        ("1,234.5", Fraction(2469, 2)),
        ("1 234", Fraction(1234)),
        ("1 23", None),
        ("33 1/3%", Fraction(1, 3)),
        ("2.5E-2", Fraction(1, 40)),
        ("1e1000", Fraction(10**1000)),
        ("1e1001", None),
        ("1e999999999999", None),
        ("10^{99999}", None),
        ("1.5 million", Fraction(1_500_000)),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        (r"-2.\overline{45}", Fraction(-27, 11)),
        ("0.(3)", Fraction(1, 3)),
        ("0.333...", Fraction(1, 3)),
        ("0.12...", None),
        ("9" * 300, Fraction(10**300 - 1)),
        ("9" * 301, None),
        ("9**9**9", None),
        ("9^9^9", None),
        ("1/0", None),
        (".", None),
        ("-", None),
        ("", None),
        ("%", None),
        ("inf", None),
        ("nan", None),
        ("1_000", None),
        ("٣", None),
    ],
)
def test_numerals_are_read_exactly_or_not_at_all(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize(
    ("gold", "answer", "is_same"),
    [
        ("1/2", "0.5", True),
        ("50", "50%", True),
        ("50%", "50", True),
        ("0.5", "50%", True),
        ("0.5", "0.5%", False),
        ("50%", "0.05", False),
        ("1/3", "0.333333", False),
        ("1/3", "0.33333333333333", False),
        ("1/3", "0.333333333333333", True),
        ("1/12", "0.0833333333333333", True),
        ("1/12", "0.0833333333333334", False),
        ("18", "18.0000000000000000000001", False),
        ("1", "0.99999999999999999999", False),
        ("1.5", "1,5", True),
        ("5", "1,5", False),
        ("1,25", "1.25", True),
        ("1,2", "1.2", None),
        ("x", "1", None),
        ("1", "x", None),
    ],
)
def test_two_numbers_are_the_same_exactly_but_for_percent_commas_and_full_doubles(
    gold, answer, is_same
):
    assert same_number(gold, answer) is is_same


def test_a_tolerance_holds_only_where_it_is_asked_for():
    assert same_number("3.14159", "3.14", relative_tolerance=1e-3)
    assert not same_number("3.14159", "3.14", relative_tolerance=1e-5)
    assert not same_number("3.14159", "3.14")


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        (r"$\dfrac12$.", r"\frac{1}{2}"),
        (r"\frac\pi2", r"\frac{\pi}{2}"),
        (r"\binom52", r"\binom{5}{2}"),
        (r"{{ x }}", "x"),
        (r"{a}{b}", "{a}{b}"),
        ("0.333...", "0.333..."),
        ("10⁻³", "10^{-3}"),
        ("x₁", "x_1"),
        ("2√3", r"2\sqrt{3}"),
        ("sqrt(2)", r"\sqrt{2}"),
        ("2pi", r"2\pi"),
        ("x**2", "x^2"),
        ("90°", r"90^\circ"),
        (r"90^{\circ}", r"90^\circ"),
        ("50 percent", "50%"),
        (r"50\%", "50%"),
        (r"10^{\text{th}}", "10"),
        (r"\text{(B)}", "(B)"),
        (r"15\mbox{ cm}^2", "15 cm ^2"),
        (r"1{,}000", "1000"),
        (r"11,\! 111", "11111"),
        (r"\$18", "$18"),
        ("$18$", "18"),
        ("**18**", "18"),
        ("The final answer is: $18$.", "18"),
        ("ℝ", r"\mathbb{R}"),
        (r"\varnothing", r"\emptyset"),
        (r"1&2\\ 3&4", r"1&2\\ 3&4"),
    ],
)
def test_normalising_gives_one_spelling(text, spelling):
    assert normalise(text).strip() == spelling


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("15 cm^2", "15", "cm^2"),
        ("15 square centimeters", "15", "cm^2"),
        ("18 apples", "18", "apple"),
        ("$18", "18", "dollar"),
        ("-$18", "-18", "dollar"),
        ("18€", "18", "euro"),
        ("60 miles per hour", "60", "mile/hour"),
        ("60 mph", "60", "mile/hour"),
        (r"90^\circ", "90", "degree"),
        ("5 m", "5", "m"),
        ("5m", "5m", ""),
        ("5 x", "5 x", ""),
        ("2 ab", "2 ab", ""),
        ("x meters", "x", "m"),
        (r"\sin 30^\circ", r"\sin 30^\circ", ""),
        ("18 or more", "18 or more", ""),
        ("18 squared", "18 squared", ""),
        ("5!", "5!", ""),
        ("apples", "apples", ""),
    ],
)
def test_a_unit_is_told_from_a_variable(text, value, unit):
    assert split_unit(text) == (value, unit)


def test_units_agree_where_one_is_missing_or_part_of_the_other():
    assert units_agree("", "cm")
    assert units_agree("apple", "red apple")
    assert not units_agree("cm", "m")
    assert not units_agree("apple", "orange")


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("204_5", ("204", "5")),
        ("0204_{5}", ("204", "5")),
        ("(204)_{(5)}", ("204", "5")),
        ("2a_{16}", ("2A", "16")),
        ("204_{five}", ("204", "5")),
        ("204 base 5", ("204", "5")),
        ("204", None),
        ("x_5", None),
        ("a_1", None),
    ],
)
def test_a_numeral_may_carry_its_base(text, base):
    assert split_base(text) == base
