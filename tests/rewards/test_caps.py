"""What is refused before algebra, and what is not."""

import pytest

from posttrain.maths.caps import refusal

REFUSED = [
    (r"9^{9^{9^9}}", "tower"),
    (r"9^{9^9}", "tower"),
    ("9^9^9", "tower"),
    ("x^{x^{x^{x^x}}}", "tower"),
    ("2^{99999}", "power"),
    ("99999^{99999}", "power"),
    ("((2^9)^{99})^{999}", "powers of powers"),
    ("(x+1)^{99999}", "powers of powers"),
    ("99999!", "factorial"),
    ("(9!)!", "factorial"),
    ("(9^9)! + 3!^{9}", "factorial"),
    (r"\binom{99999}{4}", "factorial, sum"),
    (r"\sum_{k=1}^{99999999} k", "powers of powers"),
    (r"\sum_{k=1}^n 99999 k", "sum"),
    ("9" * 101, "digits"),
    ("(" * 30 + "x" + ")" * 30, "nested"),
    ("x" * 501, "characters"),
]
ALLOWED = [
    r"\frac{-b \pm \sqrt{b^{2} - 4ac}}{2a}",
    "e^{x^2}",
    "e^{-x^{2}}",
    "2^{100}",
    "10^{300}",
    "(x+1)^2 (x-1)^3",
    "100!",
    r"\binom{52}{5}",
    r"\sum_{k=1}^{100} k^2",
    r"10^{\frac{-5+\sqrt{13}}{6}}",
    r"\sqrt{1+\sqrt{1+\sqrt{2}}}",
    "123456789012345678901234567890",
]


@pytest.mark.parametrize(("text", "why"), REFUSED)
def test_what_could_take_for_ever_is_refused_by_name(text, why):
    assert why in refusal(text)


@pytest.mark.parametrize("text", ALLOWED)
def test_ordinary_answers_are_not_refused(text):
    assert refusal(text) == ""
