r"""Deciding whether two LaTeX expressions mean the same. Runs in a worker process: see `algebra`.

    equal_pairs([["value", r"(x+1)^2", "x^2 + 2x + 1", None]])    # ["equal"]

math-verify parses LaTeX into SymPy expressions; it never gets plain text, which it would evaluate.
Its own comparison rounds to six decimals and takes 2^{-99} for 2^{-98}. So this module compares
values itself: rationals exactly, other numbers to 40 digits, expressions at fixed random points,
decimals as the fractions that they are. math-verify decides between sets, and between equations
that are not multiples of each other.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.function import AppliedUndef
from sympy.parsing import sympy_parser

DIGITS = 50  # the precision of computed values
TOLERANCE = sympy.Rational(1, 10**40)  # relative
NUM_POINTS = 8
MIN_POINTS = 3  # both sides must be defined at this many points

_CONFIG = [
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="last"
        ),
    )
]
_FLIPPED = {
    sympy.StrictLessThan: sympy.StrictGreaterThan,
    sympy.StrictGreaterThan: sympy.StrictLessThan,
    sympy.LessThan: sympy.GreaterThan,
    sympy.GreaterThan: sympy.LessThan,
}
_NUMERAL_CODE = re.compile(r"Integer ?\( ?([0-9]+) ?\)|Float ?\( ?'([0-9]*\.?[0-9]*)' ?\)")
# Most of a first parse goes into building the parser's tables; these reach the usual branches.
_WARM_UP = [
    (r"\frac{x^{2}-1}{\sqrt{3}}", r"2\sqrt[3]{5}\pi - 1.5"),
    (r"(x+1)^2 \cdot 3", r"x^2 + 2x + 1"),
    (r"\sin^2 x + \cos(2x)", r"e^{i\pi} + \ln 2"),
    (r"\frac{n(n+1)}{2}", r"\log_2 8 + |y|"),
    (r"a_{1} + 3i", r"5! + \binom{4}{2}"),
    (r"-\frac{1+\sqrt{5}}{2}", r"10^{-3} \times 4"),
]


class _Unreadable(ValueError):
    """The text is not an expression of the kind that was asked about."""


def equal_pairs(pairs: list[list]) -> list[str]:
    """Decide for each (kind, gold, answer, decimals): "equal", "different" or "gold unreadable".

    Args:
        pairs: `kind` is "value", "equation", "inequality", "matrix" or "set". `decimals`, for
            values, is None or the number of decimals that one side was rounded to.
    """
    return [_compare(*pair) for pair in pairs]


def warm_up() -> None:
    """Fill the parser's tables, and make it impossible to evaluate text in this process."""
    sympy_parser.eval_expr = _read_numeral
    for gold, answer in _WARM_UP:
        _compare("value", gold, answer, None)
    _read.cache_clear()


def _read_numeral(code: str, *_names: dict) -> sympy.Number:
    """Stand in for Python's `eval` within SymPy: read numerals, and refuse all other text.

    The LaTeX parser makes numbers of digits in this way. It has no other use for `eval`.
    """
    match = _NUMERAL_CODE.fullmatch(code.strip())
    if not match:
        raise PermissionError("text is not evaluated here")
    return sympy.Integer(match[1]) if match[1] else sympy.Float(match[2])


def _compare(kind: str, gold: str, answer: str, decimals: int | None) -> str:
    try:
        wanted = _read(gold)
    except _Unreadable:
        return "gold unreadable"
    try:
        is_equal = _COMPARISONS[kind](wanted, _read(answer), decimals)
    except _Unreadable:
        is_equal = False
    return "equal" if is_equal else "different"


@lru_cache(maxsize=256)
def _read(text: str) -> sympy.Basic:
    r"""Parse an expression: decimals as fractions, `i` as the imaginary unit, symbols by name."""
    found = parse(
        rf"\boxed{{{text}}}",
        _CONFIG,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    if not found or not isinstance(found[0], (sympy.Basic, sympy.MatrixBase)):
        raise _Unreadable(text)
    expression = found[0]
    plain = {symbol: sympy.Symbol(symbol.name) for symbol in expression.atoms(sympy.Symbol)}
    for symbol in plain:
        if symbol.name in ("i", "imath"):
            plain[symbol] = sympy.I
    plain |= {decimal: sympy.Rational(str(decimal)) for decimal in expression.atoms(sympy.Float)}
    return expression.xreplace(plain)


def _same_value(gold: sympy.Basic, answer: sympy.Basic, decimals: int | None = None) -> bool:
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        raise _Unreadable("not two values")
    gold, answer = gold.doit(), answer.doit()
    if gold.has(sympy.nan, sympy.zoo) or answer.has(sympy.nan, sympy.zoo):
        raise _Unreadable("undefined")
    if gold == answer:
        return True
    infinite = (sympy.oo, -sympy.oo)
    if gold in infinite or answer in infinite:
        return False
    functions = gold.atoms(AppliedUndef) | answer.atoms(AppliedUndef)
    stand_ins = {function: sympy.Dummy() for function in functions}
    gold, answer = gold.xreplace(stand_ins), answer.xreplace(stand_ins)
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if symbols:
        return _agree_at_points(gold, answer, symbols)
    if gold.is_Rational and answer.is_Rational and decimals is None:
        return False
    return _agree(gold.evalf(DIGITS), answer.evalf(DIGITS), decimals)


def _agree_at_points(gold: sympy.Expr, answer: sympy.Expr, symbols: list[sympy.Symbol]) -> bool:
    r"""Compare at fixed random points: where all symbols are positive, and where both are real.

    So \sqrt{x^2} is |x| and not x, and \ln(x^2) is 2 \ln x.
    """
    numbers = random.Random(len(symbols))
    num_compared = 0
    for point in range(NUM_POINTS):
        is_positive = point % 2 == 0
        values = {}
        for symbol in symbols:
            sign = 1 if is_positive else numbers.choice((-1, -1, 1))
            values[symbol] = sympy.Rational(sign * numbers.randint(300, 4000), 1009)
        one, other = (side.evalf(DIGITS, subs=values) for side in (gold, answer))
        if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
            continue
        if not is_positive and not (one.is_real and other.is_real):
            continue
        if not _agree(one, other):
            return False
        num_compared += 1
    return num_compared >= MIN_POINTS or sympy.simplify(gold - answer) == 0


def _agree(one: sympy.Expr, other: sympy.Expr, decimals: int | None = None) -> bool:
    if not all(side.is_number and side.is_finite for side in (one, other)):
        return False  # the difference of two infinities is within any bound relative to them
    difference = abs(one - other)
    if decimals is not None:
        return bool(difference * 10**decimals <= sympy.Rational(1, 2))
    # Cancellation leaves noise where a value is zero, where no relative bound can hold.
    noise = sympy.Float(10) ** (-2 * DIGITS)
    return bool(difference <= TOLERANCE * max(abs(one), abs(other)) + noise)


def _sides(relation: sympy.Basic) -> sympy.Expr:
    if not isinstance(relation, sympy.core.relational.Relational):
        raise _Unreadable("no relation")
    return relation.lhs - relation.rhs


def _ratio(gold: sympy.Basic, answer: sympy.Basic) -> sympy.Expr | None:
    """Return the constant ratio of the two relations' differences of sides, or None."""
    if not _sides(gold).free_symbols:  # "1 = 2" and "3 = 4" have no statement in common
        return None
    quotient = sympy.cancel(_sides(gold) / _sides(answer))
    return quotient if quotient.is_number and quotient.is_finite and quotient != 0 else None


def _same_equation(gold: sympy.Basic, answer: sympy.Basic, _decimals: None) -> bool:
    if not (isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq)):
        raise _Unreadable("not two equations")
    if _ratio(gold, answer) is not None:
        return True
    symbols = gold.free_symbols
    if not symbols or symbols != answer.free_symbols:
        return False
    return verify(gold, answer, timeout_seconds=None)


def _same_inequality(gold: sympy.Basic, answer: sympy.Basic, _decimals: None) -> bool:
    ratio = _ratio(gold, answer)
    if ratio is None or not ratio.is_real:
        return False
    kind = type(answer) if ratio > 0 else _FLIPPED.get(type(answer), type(answer))
    return type(gold) is kind


def _same_matrix(gold: sympy.Basic, answer: sympy.Basic, _decimals: None) -> bool:
    gold, answer = gold.doit(), answer.doit()
    if not (isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase)):
        raise _Unreadable("not two matrices")
    return gold.shape == answer.shape and all(map(_same_value, gold.flat(), answer.flat()))


def _same_set(gold: sympy.Basic, answer: sympy.Basic, _decimals: None) -> bool:
    if isinstance(answer, sympy.Eq) or not isinstance(answer, sympy.Set):
        raise _Unreadable("no set")
    return verify(gold, answer, timeout_seconds=None)


_COMPARISONS = {
    "value": _same_value,
    "equation": _same_equation,
    "inequality": _same_inequality,
    "matrix": _same_matrix,
    "set": _same_set,
}
