r"""The kind of a final answer: a value, list, set, tuple, interval, union, relation or matrix.

    read_shape(r"\{1, 2\}")          # Shape("set", …) with two values
    read_shape("x = 5 or x = 6")     # Shape("list", …): two answers are not one
    read_shape(r"1 \pm \sqrt{2}")    # Shape("list", …): both signs

This works on normalised text by counting brackets. Nothing is parsed as an expression or evaluated.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_PARTS = 64
MAX_NESTING = 12

_OPENING, _CLOSING = {"(", "[", "{", r"\{", r"\begin{", r"\end{"}, {")", "]", "}", r"\}"}
_ESCAPED_BRACE = re.compile(r"\\([{}])")
_TOKEN = re.compile(r"\\begin\{|\\end\{|\\[A-Za-z]+|\\.|[A-Za-z]+|.", re.DOTALL)
_JOINING = {
    **dict.fromkeys(("or", r"\lor", r"\vee"), "or"),
    **dict.fromkeys(("and", r"\land", r"\wedge"), "and"),
}
_SEPARATORS = {",", ";", *_JOINING}
_INEQUALITIES = {"<", ">", r"\le", r"\ge", r"\ne"}
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne", "=": "="}
_MEMBER = re.compile(r"(?P<name>[^<>=]{1,40}?) ?\\in(?![A-Za-z]) ?(?P<set>.+)")
MAX_NAME_CHARS = 60
# A name, with index, arguments or bars; a ratio or fraction of names; a tuple of names.
_NAME = re.compile(
    r"(?:[A-Za-z\\|:.'()\[\], ]|\^\{-1\}|_ ?(?:\{[^{}]{1,20}\}|[A-Za-z0-9])"
    r"|\\frac\{[A-Za-z ]+\}\{[A-Za-z ]+\}|(?<=[A-Za-z]\()-?[0-9]+(?=\)))+"
)
_VALUED = re.compile(r"\\(?:sqrt|pi|infty|sin|cos|tan|log|ln|exp|emptyset|pm|mp)(?![A-Za-z])")
# One number with its thousands apart, and perhaps a unit.
_GROUPED = re.compile(r"[-+$€£¥ ]*[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])[^,;]*")
_BOTH_SIGNS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_MATRIX = re.compile(r"\\begin\{(?:[bpB]?matrix|smallmatrix|array)\}")


class Shape(NamedTuple):
    r"""One answer, by its form.

    Attributes:
        kind: "value", "list", "set", "tuple", "interval", "union", "relation", "equation" or
            "matrix".
        text: The answer without a name for it: "x = 5" has the text "5".
        parts: The elements, or the sides of a relation.
        marks: The brackets of a tuple or interval, the signs between the sides of a relation, or
            the words that join a list.
        name: The name of the answer: "x" in "x = 5".
    """

    kind: str
    text: str
    parts: tuple[Shape, ...] = ()
    marks: tuple[str, ...] = ()
    name: str = ""


class Unreadable(ValueError):
    """The text has too many parts, or is nested too deeply, to be an answer."""


def read_shape(text: str, depth: int = 0) -> Shape:
    """Read the shape of a normalised answer. Unreadable beyond `MAX_PARTS` or `MAX_NESTING`."""
    text = text.strip()
    if depth > MAX_NESTING:
        raise Unreadable("nested too deeply")
    if (match := _MEMBER.fullmatch(text)) and is_name(match["name"]):
        return read_shape(match["set"], depth + 1)._replace(name=match["name"].strip())
    parts, found = split_top(text, _SEPARATORS)
    if ";" in found and "," in found:  # p = 5, q = 2; p = 7, q = 2
        parts, found = split_top(text, {";"})
    is_one_number = set(found) == {","} and _GROUPED.fullmatch(text)
    if len(parts) > 1 and not is_one_number:
        joined = tuple(sorted({_JOINING[mark] for mark in found if mark in _JOINING}))
        return _collection("list", text, parts, depth)._replace(marks=joined)
    unions, signs = split_top(text, {r"\cup", "U"})
    if len(unions) > 1 and all(part[:1] in ("(", "[", "\\") for part in unions):
        return _collection("union", text, unions, depth)
    sides, signs = split_top(text, {"=", r"\approx", r"\equiv", *_INEQUALITIES})
    if signs:
        return _relation(text, sides, signs, depth)
    return _bracketed(text, depth) or _both_signs(text, depth) or _single(text)


def is_name(text: str) -> bool:
    """Tell whether a text is only a name, as "x", "f(x)", "AB" or "(p, q)"; not a sum or number."""
    text = text.strip()
    if not text or len(text) > MAX_NAME_CHARS:
        return False
    return bool(_NAME.fullmatch(text) and not _VALUED.search(text))


def split_top(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """Split a text at the separators outside of brackets; return the parts and the separators."""
    depth, parts, found, start = 0, [], [], 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        depth += _step(token)
        if depth == 0 and token in separators and not _groups_thousands(text, match.start()):
            parts.append(text[start : match.start()].strip())
            found.append(token)
            start = match.end()
    parts.append(text[start:].strip())
    return _without_empty(parts, found)


def turned(shape: Shape) -> Shape:
    """Turn a relation around: 1 < x becomes x > 1."""
    return shape._replace(
        parts=shape.parts[::-1], marks=tuple(_TURNED[mark] for mark in reversed(shape.marks))
    )


def as_interval(shape: Shape) -> Shape | None:
    r"""Read an inequality of one name as an interval: "1 < x \le 2" is "(1, 2]". Else None."""
    if shape.kind != "relation" or not set(shape.marks) <= {"<", ">", r"\le", r"\ge"}:
        return None
    if shape.marks[0] in (">", r"\ge"):
        shape = turned(shape)
    if any("|" in part.text for part in shape.parts):  # 1 < |x| < 2 is two intervals
        return None
    if len(shape.parts) == 3 and is_name(shape.parts[1].text):
        low, high, marks = shape.parts[0], shape.parts[2], shape.marks
    elif len(shape.parts) == 2 and is_name(shape.parts[0].text):
        low, high, marks = Shape("value", r"-\infty"), shape.parts[1], ("<", *shape.marks)
    elif len(shape.parts) == 2 and is_name(shape.parts[1].text):
        low, high, marks = shape.parts[0], Shape("value", r"\infty"), (*shape.marks, "<")
    else:
        return None
    if not set(marks) <= {"<", r"\le"}:
        return None
    brackets = ("(" if marks[0] == "<" else "[", ")" if marks[1] == "<" else "]")
    return Shape("interval", shape.text, (low, high), brackets)


def _groups_thousands(text: str, position: int) -> bool:
    r"""Tell whether a comma is inside a number. Only if other commas of the text have spaces."""
    return (
        text[position] == ","
        and text[position + 1 : position + 4].isdigit()
        and not text[position + 4 : position + 5].isdigit()
        and text[:position][-1:].isdigit()
        and ", " in text
    )


def _without_empty(parts: list[str], found: list[str]) -> tuple[list[str], list[str]]:
    """Drop empty parts: ", and" is one separator, and one at either end is none."""
    if not any(mark in _SEPARATORS for mark in found):
        return parts, found
    return [part for part in parts if part] or [""], found


def _collection(kind: str, text: str, parts: list[str], depth: int) -> Shape:
    if len(parts) > MAX_PARTS:
        raise Unreadable(f"over {MAX_PARTS} parts")
    shapes: list[Shape] = []
    for part in parts:
        shape = read_shape(part, depth + 1)
        # An element with \\pm is two elements of the whole.
        is_flat = kind in ("list", "set") and shape.kind == "list" and _BOTH_SIGNS.search(part)
        shapes += shape.parts if is_flat else [shape]
    return Shape(kind, text, tuple(shapes))


def _relation(text: str, sides: list[str], signs: list[str], depth: int) -> Shape:
    if set(signs) <= {"=", r"\approx"}:
        return _equation(text, sides, signs, depth)
    if r"\equiv" in signs or r"\approx" in signs or "" in sides:
        return Shape("value", text)
    return Shape("relation", text, tuple(Shape("value", side) for side in sides), tuple(signs))


def _equation(text: str, sides: list[str], signs: list[str], depth: int) -> Shape:
    r"""Read an equation, or a named value: "x = 5", "5 = x", "x = 2 + 3", "x = 1/3 \approx 0.3"."""
    is_named = is_name(sides[0]) or not sides[0]
    first_rounded = signs.index(r"\approx") if r"\approx" in signs else len(signs)
    if 0 < first_rounded < len(signs) or (first_rounded == 0 and not is_named):
        exact = " = ".join(sides[: first_rounded + 1])
        return read_shape(exact, depth + 1)
    if is_named:
        return read_shape(sides[-1], depth + 1)._replace(name=sides[0])
    if len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0]):
        return read_shape(sides[0], depth + 1)._replace(name=sides[1])
    return Shape("equation", text, tuple(Shape("value", side) for side in sides), tuple(signs))


def _bracketed(text: str, depth: int) -> Shape | None:
    """Read a set, tuple, interval or matrix, or what a single pair of parentheses holds."""
    if _MATRIX.match(text.lstrip("([ ")) and text.rstrip(")] ").endswith("}"):
        return Shape("matrix", text)
    plain = _ESCAPED_BRACE.sub(lambda match: "\ue001" if match[1] == "{" else "\ue002", text)
    if plain[:1] == "\ue001" and plain[-1:] == "\ue002" and _closes_last(text):
        inner, _ = split_top(text[2:-2], {",", ";"})
        return _collection("set", text, inner, depth)
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]") or not _closes_last(text):
        return None
    inner, _ = split_top(text[1:-1], {",", ";"})
    brackets = (text[0], text[-1])
    if len(inner) == 1 and brackets == ("(", ")"):
        return read_shape(inner[0], depth + 1)
    shape = _collection("tuple", text, inner, depth)._replace(marks=brackets)
    return shape._replace(kind="interval") if brackets != ("(", ")") and len(inner) == 2 else shape


def _step(token: str) -> int:
    if token in _OPENING:
        return 1
    return -1 if token in _CLOSING else 0


def _closes_last(text: str) -> bool:
    """Tell whether the first bracket is closed by the last one."""
    depth = 0
    for match in _TOKEN.finditer(text):
        depth += _step(match.group())
        if depth == 0:
            return match.end() == len(text)
    return False


def _both_signs(text: str, depth: int) -> Shape | None:
    r"""Read \pm as two values; None without it."""
    if not _BOTH_SIGNS.search(text):
        return None
    upper = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", text))
    lower = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", text))
    return _collection("list", text, [upper, lower], depth)


def _single(text: str) -> Shape:
    return Shape("value", text.lstrip("+ "))
