r"""Bounds on what is handed to algebra, because deciding the rest could take for ever.

    refusal(r"9^{9^{9^9}}")    # "a tower of powers"
    refusal(r"x^{2} + 1")      # "": nothing against it

The bounds do not judge an answer: nearly every real one lies far below them. Texts that slip
through meet the time and memory limits of a worker.
"""

from __future__ import annotations

import math
import re

MAX_CHARS = 500
MAX_NESTING = 10
MAX_DIGITS = 100  # of one numeral
MAX_POWER_DIGITS = 1_000  # of a numeral raised to a numeral
MAX_TOWER = 3  # levels of powers in exponents: e^{x^2} has two
MAX_CHAINED_EXPONENT = 10_000  # all exponents of a chain ((x^a)^b)^c, multiplied
MAX_FACTORIAL = 1_000  # the largest numeral beside a factorial, binomial, sum or product

_POWER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*\)?\s*\^\s*[{(]?\s*[+-]?\s*([0-9]+)")
_CHAINED = re.compile(r"[)}\]]\s*\^\s*[{(]?\s*-?([0-9]+)")
_COUNTING = re.compile(r"!|\\(?:binom|choose|sum|prod|int|lim)(?![A-Za-z])")
_NESTED_FACTORIAL = re.compile(r"!\s*[)}\]]*\s*!|\^[^+-]*!\s*[)}]|!\s*[)}\]]*\s*\^")
_NUMERAL = re.compile(r"[0-9]+")


def refusal(text: str) -> str:
    """Return the reason not to hand this text on, or "" if there is none."""
    if len(text) > MAX_CHARS:
        return f"over {MAX_CHARS} characters"
    numerals = [len(match.group()) for match in _NUMERAL.finditer(text)]
    if max(numerals, default=0) > MAX_DIGITS:
        return f"a numeral of over {MAX_DIGITS} digits"
    nesting, tower = _depths(text)
    if nesting > MAX_NESTING:
        return "nested too deeply"
    if tower > MAX_TOWER or (tower > 1 and _is_numeric_tower(text)):
        return "a tower of powers"
    if any(_power_digits(*match.groups()) > MAX_POWER_DIGITS for match in _POWER.finditer(text)):
        return f"a power of over {MAX_POWER_DIGITS} digits"
    chained = math.prod(max(int(match[1]), 1) for match in _CHAINED.finditer(text))
    if chained > MAX_CHAINED_EXPONENT:
        return "powers of powers"
    return _counting_refusal(text)


def _depths(text: str) -> tuple[int, int]:
    """Return the depth of nested brackets and the depth of nested exponents."""
    deepest = tower = 0
    stack: list[bool] = []  # for each open bracket: whether it holds an exponent
    previous = ""
    bare = 0  # exponents without braces in a row, as in 9^9^9
    for character in text:
        if character in "([{":
            stack.append(previous == "^")
            bare = 0
        elif character in ")]}":
            bare = 0
            if stack:
                stack.pop()
        elif character == "^":
            bare += 1
            tower = max(tower, sum(stack) + bare)
        elif not character.isalnum() and character != " ":
            bare = 0
        deepest = max(deepest, len(stack))
        previous = character if character != " " else previous
    return deepest, tower


def _is_numeric_tower(text: str) -> bool:
    """Tell whether an exponent holds a power of two numerals, as in 9^{9^9}."""
    return bool(re.search(r"\^\s*[{(]?[^{}()]*[0-9]\s*[)}]*\s*\^\s*[{(]?\s*[0-9]{1,}", text))


def _power_digits(base: str, exponent: str) -> float:
    size = abs(math.log10(float(base))) if float(base) else 0.0
    return size * int(exponent)


def _counting_refusal(text: str) -> str:
    if not _COUNTING.search(text):
        return ""
    if _NESTED_FACTORIAL.search(text):
        return "a factorial of a factorial or power"
    numerals = (match.group() for match in _NUMERAL.finditer(text))
    if max((int(numeral) for numeral in numerals), default=0) > MAX_FACTORIAL:
        return f"a factorial, sum or product with numerals over {MAX_FACTORIAL}"
    return ""
