r"""Deciding whether two final answers mean the same: by form, then exactly, then by algebra.

    comparison = Comparison()
    comparison.shapes(read_shape("1/2"), read_shape("0.5"))      # True
    comparison.shapes(read_shape("x + 1"), read_shape("1 + x"))  # None: not without algebra
    comparison.pending                                           # the pairs to ask algebra about

One value is matched by one value only, never by a list, range, interval or inequality. Sets match
in any order, tuples in their own. Units (if both sides have one), bases, brackets and the case of
letters must agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from posttrain.maths.algebra import Pair
from posttrain.maths.caps import refusal
from posttrain.maths.normalise import text_key
from posttrain.maths.numerals import (
    double_decimals,
    read_number,
    same_number,
    split_base,
    split_unit,
    units_agree,
)
from posttrain.maths.shapes import Shape, as_interval, turned

MAX_PENDING = 40  # pairs that one comparison may leave to algebra

_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{4,}|^[A-Za-z]{3,}$")
_SYMBOL = re.compile(r"[A-Za-z](?:_ ?\{?[A-Za-z0-9]+\}?)?")
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?\^\\circ")
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_SET_LIKE = re.compile(r"\\(?:mathbb|setminus|backslash|cap|cup|emptyset)(?![A-Za-z])")
_SYNONYMS = {
    "no solutions": r"\emptyset",
    "no solution": r"\emptyset",
    "no real solutions": r"\emptyset",
    "empty set": r"\emptyset",
    "all real numbers": r"\mathbb{R}",
    "all reals": r"\mathbb{R}",
    r"(-\infty,\infty)": r"\mathbb{R}",
    r"(-\infty,+\infty)": r"\mathbb{R}",
}


class Refused(Exception):
    """A pair is not handed to algebra. The message says why."""


class Comparison:
    """Compares shapes, in two passes where that takes algebra.

    In a first comparison, a result that only algebra can tell is None, and its pairs are listed in
    `pending`. A second comparison that knows algebra's answers decides it.

    Args:
        known: Algebra's answers: whether each pair is equal.
        relative_tolerance: Largest distance of a number from a gold number, as a share of the gold.

    Attributes:
        reason: The rule that decided last.
        pending: The pairs that need algebra, in order.
    """

    def __init__(
        self,
        known: Mapping[Pair, bool] | None = None,
        *,
        relative_tolerance: float = 0.0,
    ) -> None:
        self.known = known or {}
        self.relative_tolerance = relative_tolerance
        self.reason = ""
        self.pending: dict[Pair, None] = {}

    def shapes(self, gold: Shape, answer: Shape) -> bool | None:
        """Compare two answers: True, False, or None if that depends on what is pending."""
        if _text(gold.text) == _text(answer.text) and gold.kind == answer.kind:
            has_names = self._names(gold, answer)
            return self._decide(has_names, "equal text" if has_names else "different names")
        if gold.name and answer.name and not self._names(gold, answer):
            return self._as_equations(gold, answer, "different names")
        if len(answer.parts) == 1 and answer.kind == "set" and gold.kind == "value":
            answer = answer.parts[0]
        if len(gold.parts) == 1 and gold.kind == "set" and answer.kind == "value":
            gold = gold.parts[0]
        if compare := _COMPARE.get((gold.kind, answer.kind)):
            return compare(self, gold, answer)
        if {gold.kind, answer.kind} == {"list", "value"} and same_number(gold.text, answer.text):
            return self._decide(True, "equal numbers")
        if {gold.kind, answer.kind} & {"value", "union"} and _is_set_like(gold, answer):
            return self._ask("set", gold.text, answer.text, "different sets")
        if gold.kind == "value":
            return self._decide(False, "not one value")
        return self._decide(False, f"a different kind: {answer.kind} for {gold.kind}")

    def _names(self, gold: Shape, answer: Shape) -> bool:
        """Tell whether names agree. Only names of one letter can differ: f(x) may be called y."""
        names = [text_key(shape.name) for shape in (gold, answer)]
        are_symbols = all(_SYMBOL.fullmatch(name) for name in names)
        return not are_symbols or names[0] == names[1]

    def _decide(self, is_equal: bool, reason: str) -> bool:
        self.reason = reason
        return is_equal

    def _ask(self, kind: str, gold: str, answer: str, if_not: str) -> bool | None:
        decimals = (double_decimals(gold), double_decimals(answer)) if kind == "value" else ()
        pair = Pair(kind, gold, answer, next((n for n in decimals if n is not None), None))
        if pair in self.known:
            is_equal = self.known[pair]
            return self._decide(is_equal, "equal by algebra" if is_equal else if_not)
        for text in (gold, answer):
            if problem := refusal(text):
                raise Refused(problem)
        self.pending[pair] = None
        if len(self.pending) > MAX_PENDING:
            raise Refused(f"over {MAX_PENDING} pairs of expressions")
        self.reason = "not decided without algebra"
        return None

    def _values(self, gold: Shape, answer: Shape) -> bool | None:
        is_equal = self._texts(gold.text, answer.text)
        if is_equal is True or not (gold.name and answer.name and _SYMBOL.search(gold.text)):
            return is_equal
        return _any([is_equal, self._as_equations(gold, answer, self.reason)])

    def _texts(self, gold: str, answer: str) -> bool | None:
        """Compare two single values."""
        if _text(gold) == _text(answer):
            return self._decide(True, "equal text")
        bases = split_base(gold), split_base(answer)
        if any(bases):
            digits = [
                base or (text.lstrip("0"), "10")
                for base, text in zip(bases, (gold, answer), strict=True)
            ]
            return self._decide(digits[0] == digits[1], "the numeral with its base")
        (gold, gold_unit), (answer, unit) = split_unit(gold), split_unit(answer)
        if not units_agree(gold_unit, unit):
            return self._decide(False, "different units")
        is_equal = same_number(gold, answer, relative_tolerance=self.relative_tolerance)
        if is_equal is not None:
            return self._decide(is_equal, "equal numbers" if is_equal else "different numbers")
        if _text(gold) == _text(answer):
            return self._decide(True, "equal text")
        if _WORD.search(gold) and gold.casefold() == answer.casefold():
            return self._decide(True, "equal words")
        if ":" in gold + answer:
            return self._ratios(gold, answer)
        if problem := _no_algebra(gold, answer):
            return self._decide(False, problem)
        gold, answer = map(_for_algebra, (gold, answer))
        return self._ask("value", gold, answer, "different values")

    def _ratios(self, gold: str, answer: str) -> bool:
        terms = [text.split(":") for text in (gold, answer)]
        if len(terms[0]) != len(terms[1]):
            return self._decide(False, "different ratio or time")
        same = (same_number(g.strip(), a.strip()) for g, a in zip(*terms, strict=True))
        return self._decide(all(same), "the terms of a ratio or time")

    def _ordered(self, gold: Shape, answer: Shape) -> bool | None:
        if len(gold.parts) != len(answer.parts):
            return self._decide(False, "another number of elements")
        brackets = {shape.marks for shape in (gold, answer) if shape.kind != "list" and shape.marks}
        if len(gold.parts) == 2 and len(brackets) == 2:
            return self._decide(False, "different brackets")
        results = [self.shapes(g, a) for g, a in zip(gold.parts, answer.parts, strict=True)]
        if False in results:
            return self._decide(False, "different elements")
        return None if None in results else self._decide(True, self._equal_elements())

    def _equal_elements(self) -> str:
        return "equal by algebra" if self.known else "equal elements"

    def _unordered(self, gold: Shape, answer: Shape) -> bool | None:
        """Compare as sets: each element of one side is among those of the other."""
        are_relations = any(part.kind == "relation" for part in gold.parts)
        if are_relations and {gold.marks, answer.marks} == {("and",), ("or",)}:
            return self._decide(False, "one relation and the other, or either")
        if self._are_named_apart(gold) != self._are_named_apart(answer):
            return self._ordered(gold, answer)
        rows = [[self.shapes(g, a) for a in answer.parts] for g in gold.parts]
        found = [_any(line) for line in (*rows, *zip(*rows, strict=True))]
        if False in found:
            return self._decide(False, "different elements")
        return None if None in found else self._decide(True, self._equal_elements())

    @staticmethod
    def _are_named_apart(shape: Shape) -> bool:
        """Tell whether each value has its own name, as in "x = 1, y = 2". x_1 and x_2 are x."""
        names = [part.name.partition("_")[0] for part in shape.parts]
        return all(names) and len(set(names)) == len(names) > 1

    def _relations(self, gold: Shape, answer: Shape) -> bool | None:
        for candidate in (answer, turned(answer)):
            if gold.marks == candidate.marks:
                sides = zip(gold.parts, candidate.parts, strict=True)
                if all(_text(g.text) == _text(a.text) for g, a in sides):
                    return self._decide(True, "equal relations")
        one, other = as_interval(gold), as_interval(answer)
        if one and other:
            return self._ordered(one, other)
        if len(gold.marks) > 1 or len(answer.marks) > 1:
            return self._chains(gold, answer)
        return self._ask("inequality", gold.text, answer.text, "different relations")

    def _chains(self, gold: Shape, answer: Shape) -> bool | None:
        for candidate in (answer, turned(answer)):
            if gold.marks == candidate.marks:
                return self._ordered(gold._replace(marks=()), candidate._replace(marks=()))
        return self._decide(False, "different relations")

    def _interval_for_relation(self, gold: Shape, answer: Shape) -> bool | None:
        if interval := as_interval(gold):
            return self._ordered(interval, answer)
        return self._ask("set", gold.text, answer.text, "different sets")

    def _union_for_relations(self, gold: Shape, answer: Shape) -> bool | None:
        """Compare relations such as "x < 2 or x > 3", read as intervals, with a union."""
        intervals = tuple(as_interval(part) for part in gold.parts)
        if None in intervals:
            return self._decide(False, "a union of sets for a list")
        return self._unordered(gold._replace(parts=intervals), answer)

    def _equations(self, gold: Shape, answer: Shape) -> bool | None:
        return self._ask("equation", gold.text, answer.text, "different equations")

    def _as_equations(self, gold: Shape, answer: Shape, if_not: str) -> bool | None:
        r"""Compare as equations: y = 2x + 1 is 2x - y + 1 = 0; "x = 5" is not "y = 5"."""
        texts = [
            shape.text if shape.kind == "equation" else f"{shape.name} = {shape.text}"
            for shape in (gold, answer)
        ]
        has_names = all(shape.name or shape.kind == "equation" for shape in (gold, answer))
        is_plain = any(read_number(shape.text) is not None for shape in (gold, answer))
        if not has_names or is_plain:
            return self._decide(False, if_not)
        return self._ask("equation", *texts, if_not)

    def _value_for_an_equation_gold(self, gold: Shape, answer: Shape) -> bool | None:
        return self._as_equations(gold, answer, "a value for an equation")

    def _matrices(self, gold: Shape, answer: Shape) -> bool | None:
        if not all(r"\begin{" in shape.text for shape in (gold, answer)):
            return self._decide(False, "a matrix and no matrix")
        return self._ask("matrix", gold.text, answer.text, "different matrices")

    def _value_for_equation(self, gold: Shape, answer: Shape) -> bool | None:
        """Compare a value with a chain such as 2^3 = 8, whose sides must all be that value."""
        if gold.name:
            return self._as_equations(gold, answer, "different equations")
        if any(_SYMBOL.search(_COMMAND.sub("", side.text)) for side in answer.parts):
            return self._decide(False, "an equation for a value")
        results = [self._texts(gold.text, side.text) for side in answer.parts]
        if False in results:
            return self._decide(False, "an equation that does not hold, or of another value")
        return None if None in results else True


def _for_algebra(text: str) -> str:
    """Rewrite what algebra's parser would misread: degrees, and commas inside numbers."""
    return _DEGREES.sub(r"\\frac{\1\\pi}{180}", _THOUSANDS_COMMA.sub("", text))


def _any(results: Sequence[bool | None]) -> bool | None:
    if True in results:
        return True
    return None if None in results else False


def _text(text: str) -> str:
    text = text_key(text)
    return _SYNONYMS.get(text.lower(), text)


def _is_set_like(*shapes: Shape) -> bool:
    return all(
        bool(_SET_LIKE.search(shape.text))
        if shape.kind == "value"
        else shape.kind in ("set", "interval", "union", "tuple")
        for shape in shapes
    )


def _no_algebra(gold: str, answer: str) -> str:
    """Return why two texts differ without asking algebra, or "": words, or signs it would drop."""
    plain = [_COMMAND.sub(" ", text) for text in (gold, answer)]
    if any(_WORD.search(text) for text in plain):
        return "different words"
    if "'" in gold + answer or "$" in gold + answer or "%" in gold + answer:
        return "differs as text"
    letters = set("".join(plain))
    if any(letter.isupper() and letter.lower() in letters for letter in letters):
        return "letters of different case"
    return ""


_COMPARE: dict[tuple[str, str], Callable[[Comparison, Shape, Shape], bool | None]] = {
    ("value", "value"): Comparison._values,
    ("list", "list"): Comparison._unordered,
    ("list", "set"): Comparison._unordered,
    ("set", "list"): Comparison._unordered,
    ("set", "set"): Comparison._unordered,
    ("union", "union"): Comparison._unordered,
    ("list", "tuple"): Comparison._ordered,
    ("tuple", "list"): Comparison._ordered,
    ("tuple", "tuple"): Comparison._ordered,
    ("tuple", "interval"): Comparison._ordered,
    ("interval", "tuple"): Comparison._ordered,
    ("interval", "interval"): Comparison._ordered,
    ("relation", "relation"): Comparison._relations,
    ("relation", "interval"): Comparison._interval_for_relation,
    ("relation", "tuple"): Comparison._interval_for_relation,
    ("relation", "union"): Comparison._interval_for_relation,
    ("equation", "equation"): Comparison._equations,
    ("equation", "value"): Comparison._value_for_an_equation_gold,
    ("value", "equation"): Comparison._value_for_equation,
    ("matrix", "matrix"): Comparison._matrices,
    ("matrix", "value"): Comparison._matrices,
    ("value", "matrix"): Comparison._matrices,
    ("list", "union"): Comparison._union_for_relations,
}
