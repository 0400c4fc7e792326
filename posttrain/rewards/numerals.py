"""A written number as an exact fraction, or None: decimals, fractions, mixed, powers of ten.

    read_number("1 1/2")      # Fraction(3, 2)
    read_number("1.5e3")      # Fraction(1500, 1)
    read_number("9**9**9")    # None: an expression is not a numeral

Nothing is evaluated, and length and exponent are capped: no input costs more than microseconds.
`1,000` is a thousand (a comma before groups of three digits), never a decimal comma.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

MAX_NUMERAL_CHARS = 300
MAX_EXPONENT = 1_000  # of ten; 1e999999 written out would fill a megabyte

_DECIMAL = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
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


def read_number(text: str) -> Fraction | None:
    """The value of a normalised numeral, sign and percent sign included; None for all other text.

    A percent sign divides by a hundred: "50%" is 1/2, not 50.
    """
    if len(text) > MAX_NUMERAL_CHARS:
        return None
    scale = Fraction(1)
    if text.endswith("%"):
        text, scale = text[:-1].rstrip(), Fraction(1, 100)
    if text[:1] in ("+", "-"):
        scale = -scale if text[0] == "-" else scale
        text = text[1:].lstrip()
    if _PLAIN.fullmatch(text):
        return scale * _decimal(text)
    for read in (_fraction, _mixed, _scientific):
        value = read(text)
        if value is not None:
            return scale * value
    return None


def _decimal(digits: str) -> Fraction:
    sign = -1 if digits.startswith("-") else 1
    whole, _, decimals = digits.lstrip("+- ").replace(",", "").partition(".")
    return Fraction(sign * int(whole + decimals), 10 ** len(decimals))


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
