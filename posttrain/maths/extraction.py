"""Where the answer stands in a completion: string work only, linear in the text's length.

    extract_answers("<think>6 * 7</think><answer>42</answer>").answers   # ["42"]

Strict by default: after the last `</think>`, inside the last `<answer>…</answer>` if there is one,
what is boxed, else the body of `<answer>` as it stands. An answer that was begun and not finished
is none, so that a truncated answer earns nothing for what it was still thinking.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_ZONE_CHARS = 20_000  # an answer stands at the end; the rest of a runaway text is not searched

# Escaped braces and backslashes are matched so that they are stepped over.
_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")
# Words and signs that may stand between two boxes which are one answer.
_BETWEEN_BOXES = {"and", "or", "text", "quad", "boxed", "fbox"}
# The sign counts only where nothing is subtracted: the last number of "5-3" is 3.
_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\$?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?(?:\\?%)?")


class Extracted(NamedTuple):
    """The answers as written (several only where several boxes stand), or why there is none."""

    answers: list[str]
    problem: str = ""


def final_text(completion: str, *, prefilled_think: bool = False) -> str | None:
    """What follows the last `</think>`, all where no tag is; None inside an open `<think>`."""
    if prefilled_think:
        completion = "<think>" + completion
    tail = completion.rpartition("</think>")[2]
    return None if "<think>" in tail else tail


def boxed(text: str) -> list[str]:
    """The bodies of all outermost balanced `\\boxed{}`, in order, by counting braces once."""
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
    r"""The last box and those right before it: "\boxed{1} and \boxed{2}" is "1, 2"; "" for none."""
    spans = _box_spans(text)
    run = spans[-1:]
    for start, end in reversed(spans[:-1]):
        if not set(re.findall(r"[\w=+-]+", text[end : run[0][0]])) <= _BETWEEN_BOXES:
            break
        run.insert(0, (start, end))
    return ", ".join(dict.fromkeys(text[start:end] for start, end in run))


def after_hashes(text: str) -> str:
    """The first line behind the last `####`, as in GSM8K's worked answers; all without hashes."""
    return text.rpartition("####")[2].strip().partition("\n")[0]


def last_number(text: str) -> str:
    """The last numeral of the text, or an empty string."""
    found = ""
    for match in _NUMBER.finditer(text):
        found = match.group()
    return found.rstrip(",")


def extract_answers(
    completion: str,
    *,
    prefilled_think: bool = False,
    allow_hashes: bool = False,
    allow_last_number: bool = False,
) -> Extracted:
    """The answers that a completion commits itself to.

    Args:
        completion: The answer's text, without special tokens.
        prefilled_think: The template ended in `<think>`, so the text starts inside it.
        allow_hashes: Lenient: where nothing is boxed, what follows the last `####`.
        allow_last_number: Lenient: where nothing is boxed or hashed, the last numeral. For golds
            that are numbers only.
    """
    text = final_text(completion, prefilled_think=prefilled_think)
    if text is None:
        return Extracted([], "<think> is not closed")
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    is_tagged = start >= 0
    if is_tagged:
        text = text[start + len("<answer>") : end]
    elif "<answer>" in text or end >= 0:
        return Extracted([], "<answer> is not closed, or not opened")
    zone = text[-MAX_ZONE_CHARS:]
    if boxes := boxed(zone):
        return Extracted(boxes)
    if allow_hashes and "####" in zone:
        return Extracted([after_hashes(zone)])
    if allow_last_number and (number := last_number(zone)):
        return Extracted([number])
    if is_tagged:
        return Extracted([text])
    return Extracted([], r"no <answer> and no \boxed{}")
