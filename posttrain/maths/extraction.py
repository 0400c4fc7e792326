r"""Extracting the final answers from a text by string operations, linear in the text's length.

    extract_answers(r"So it is \boxed{42}.").answers     # ["42"]
    extract_answers("42", is_whole=True).answers         # ["42"]

Strict by default: only an answer that is boxed counts, unless the whole text is known to be one. A
box that is not closed is none.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_ZONE_CHARS = 20_000  # an answer stands at the end; only the end of a runaway text is searched

# Escaped braces and backslashes are matched, so that they are not taken for braces.
_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")
# Words that may stand between two boxes that are one answer together.
_BETWEEN_BOXES = {"and", "or", "text", "quad", "boxed", "fbox"}
# The sign belongs to the number unless something is subtracted: the last number of "5-3" is 3.
_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\$?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?(?:\\?%)?")


class Extracted(NamedTuple):
    """The answers as written, one for each box, or the problem that leaves none."""

    answers: list[str]
    problem: str = ""


def boxed(text: str) -> list[str]:
    """Return the bodies of all outermost balanced boxes, in order. Counts braces in one pass."""
    return [text[start:end] for start, end in _box_spans(text)]


def _box_spans(text: str) -> list[tuple[int, int]]:
    open_braces: list[int | None] = []  # where a box's body starts, None for any other brace
    spans: list[tuple[int, int]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token.endswith("{") and token != r"\{":
            open_braces.append(match.end() if len(token) > 1 else None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                while spans and spans[-1][0] > start:  # a box inside this one is part of its body
                    spans.pop()
                spans.append((start, match.start()))
    return spans


def last_boxes(text: str) -> str:
    r"""Join the last box and those right before it: "\boxed{1} and \boxed{2}" is "1, 2".

    Returns "" for a text without a box.
    """
    spans = _box_spans(text)
    run = spans[-1:]
    for start, end in reversed(spans[:-1]):
        if not set(re.findall(r"[\w=+-]+", text[end : run[0][0]])) <= _BETWEEN_BOXES:
            break
        run.insert(0, (start, end))
    return ", ".join(dict.fromkeys(text[start:end] for start, end in run))


def after_hashes(text: str) -> str:
    """Return the first line after the last `####`, as in GSM8K's answers; all without hashes."""
    return text.rpartition("####")[2].strip().partition("\n")[0]


def last_number(text: str) -> str:
    """Return the last numeral of the text, or an empty string."""
    found = ""
    for match in _NUMBER.finditer(text):
        found = match.group()
    return found.rstrip(",")


def extract_answers(
    text: str,
    *,
    is_whole: bool = False,
    allow_hashes: bool = False,
    allow_last_number: bool = False,
) -> Extracted:
    """Extract the final answers from a text.

    Args:
        text: The final text of a completion, or a body of `<answer>`.
        is_whole: Without a box, the whole text is the answer, as in the body of `<answer>`.
        allow_hashes: Lenient: without a box, take what follows the last `####`.
        allow_last_number: Lenient: without box and hashes, take the last numeral. Only for golds
            that are numbers.
    """
    zone = text[-MAX_ZONE_CHARS:]
    if boxes := boxed(zone):
        return Extracted(boxes)
    if allow_hashes and "####" in zone:
        return Extracted([after_hashes(zone)])
    if allow_last_number and (number := last_number(zone)):
        return Extracted([number])
    if is_whole:
        return Extracted([text])
    return Extracted([], r"no <answer> and no \boxed{}")
