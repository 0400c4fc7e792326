r"""A written number as an exact fraction, or None: decimals, fractions, mixed, powers of ten.

    read_number("1 1/2")                  # Fraction(3, 2)
    read_number("1.5e3")                  # Fraction(1500, 1)
    read_number(r"0.1\overline{6}")       # Fraction(1, 6)
    read_number("9**9**9")                # None: an expression is not a numeral

Nothing is evaluated, and length and exponent are capped: no input costs more than microseconds.
`1,000` and `1 000` are a thousand (before groups of three digits). That `1,5` may be one and a half
is known to `same_number` alone, which sees what it is compared with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

MAX_NUMERAL_CHARS = 300
MAX_EXPONENT = 1_000  # of ten; 1e999999 written out would fill a megabyte
DOUBLE_DIGITS = 15  # as many as a double has for certain: such a decimal is a computer's 1/12

_DECIMAL = (
    r"(?:[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]+)?"
    r"|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
)
_SIGNED = rf"(?:[+-] ?)?{_DECIMAL}"
_PLAIN = re.compile(_DECIMAL)
_FRACTION = re.compile(
    rf"({_DECIMAL}) ?/ ?({_SIGNED})|\\frac ?\{{ ?({_SIGNED}) ?\}} ?\{{ ?({_SIGNED}) ?\}}"
)
_MIXED = re.compile(r"([0-9]+)(?: ([0-9]+) ?/ ?([0-9]+)| ?\\frac ?\{([0-9]+)\} ?\{([0-9]+)\})")
_SCIENTIFIC = re.compile(
    rf"({_DECIMAL})[eE]([+-]?[0-9]+)"
    rf"|(?:({_DECIMAL}) ?(?:\\times|\\cdot|[*x]) ?)?"
    r"10 ?\^ ?(?:\{ ?([+-]?[0-9]+) ?\}|([+-]?[0-9]+))"
)
_REPEATING = re.compile(
    r"([0-9]*)\.([0-9]*)(?:\\(?:overline|bar|dot) ?(?:\{ ?([0-9]+) ?\}|([0-9]))|\(([0-9]+)\))"
)
_GOING_ON = re.compile(r"([0-9]*)\.([0-9]*?)([0-9])\3{2,} ?\.\.\.")
_MAGNITUDE = re.compile(r"(.*[0-9]) ?(hundred|thousand|million|billion|trillion)")
_MAGNITUDES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_DECIMAL_COMMA = re.compile(r"-?(?:0,[0-9]+|[1-9][0-9]*,(?![0-9]{3}$)[0-9]+)")


def read_number(text: str) -> Fraction | None:
    """The value of a normalised numeral, sign and percent sign included; None for all other text.

    A percent sign divides by a hundred: "50%" is 1/2.
    """
    if len(text) > MAX_NUMERAL_CHARS:
        return None
    scale = Fraction(1)
    if text.endswith("%"):
        text, scale = text[:-1].rstrip(), Fraction(1, 100)
    if match := _MAGNITUDE.fullmatch(text):
        text, scale = match[1], scale * _MAGNITUDES[match[2]]
    if text[:1] in ("+", "-"):
        scale = -scale if text[0] == "-" else scale
        text = text[1:].lstrip()
    if _PLAIN.fullmatch(text):
        return scale * _decimal(text)
    for read in (_fraction, _mixed, _scientific, _repeating):
        value = read(text)
        if value is not None:
            return scale * value
    return None


def same_number(gold: str, answer: str, *, relative_tolerance: float = 0.0) -> bool | None:
    """Are these two texts the same number? None where one of them is no number.

    Exact, but for `relative_tolerance` (of the gold, 0 by default) and these three:

    - a percent sign on one side only may be a unit: "50" is "50%", as is "1/2". A number below one
      is a share, so that "0.5" is not "0.5%";
    - an answer "1,5" is 1.5, and a gold "1,25" is 1.25 where the answer is a single number;
    - a decimal of 15 digits or more that is the other side rounded: a computer's 1/12.
    """
    gold_number, number = read_number(gold), read_number(answer)
    if gold_number is None and number is not None and "," in gold and gold[-2:-1] != ",":
        gold_number = _decimal_comma(gold)
    elif number is None and gold_number is not None:
        number = _decimal_comma(answer)
    if gold_number is None or number is None:
        return None
    if abs(gold_number - number) <= Fraction(relative_tolerance) * abs(gold_number):
        return True
    if gold.endswith("%") != answer.endswith("%"):
        bare, share = (gold_number, number) if answer.endswith("%") else (number, gold_number)
        return abs(bare) >= 1 and bare == share * 100
    return any(
        decimals is not None and abs(gold_number - number) * 10**decimals <= Fraction(1, 2)
        for decimals in (double_decimals(gold), double_decimals(answer))
    )


def double_decimals(text: str) -> int | None:
    """The decimals of a plain decimal that has as many digits as a computer prints, else None."""
    text = text.lstrip("+- ")
    _, point, decimals = text.partition(".")
    digits = text.replace(".", "").lstrip("0")
    if not (point and len(digits) <= MAX_NUMERAL_CHARS and re.fullmatch("[0-9]+", digits)):
        return None
    return len(decimals) if len(digits) >= DOUBLE_DIGITS else None


def _decimal(digits: str) -> Fraction:
    sign = -1 if digits.startswith("-") else 1
    plain = digits.lstrip("+- ").replace(",", "").replace(" ", "")
    whole, _, decimals = plain.partition(".")
    return Fraction(sign * int(whole + decimals), 10 ** len(decimals))


def _decimal_comma(text: str) -> Fraction | None:
    return _decimal(text.replace(",", ".")) if _DECIMAL_COMMA.fullmatch(text) else None


def _groups(match: re.Match[str]) -> Iterator[str]:
    return (group for group in match.groups() if group is not None)


def _fraction(text: str) -> Fraction | None:
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    numerator, denominator = map(_decimal, _groups(match))
    return numerator / denominator if denominator else None


def _mixed(text: str) -> Fraction | None:
    match = _MIXED.fullmatch(text)
    if not match:
        return None
    whole, numerator, denominator = map(int, _groups(match))
    # "2 3/2" is no mixed number: more likely a product, or a slip
    return whole + Fraction(numerator, denominator) if numerator < denominator else None


def _scientific(text: str) -> Fraction | None:
    match = _SCIENTIFIC.fullmatch(text)
    if not match:
        return None
    *mantissa, exponent = _groups(match)
    if abs(int(exponent)) > MAX_EXPONENT:
        return None
    return (_decimal(mantissa[0]) if mantissa else 1) * Fraction(10) ** int(exponent)


def _repeating(text: str) -> Fraction | None:
    """0.1666… as (16 - 1) / 90: what is shown once more, less what is shown before, over nines."""
    match = _REPEATING.fullmatch(text) or _GOING_ON.fullmatch(text)
    if not match:
        return None
    whole, once, period = _groups(match)
    repeated = int(whole + once + period) - int(whole + once or "0")
    return Fraction(repeated, (10 ** len(period) - 1) * 10 ** len(once))
