"""Parsing: a teacher's text to tasks, instructions, types and instances.

    for item in parse_tasks(answer.text, is_cut=False):
        item.found        # a Task, or a Rejected

What is not in the form that was asked for becomes a Rejected in its place, never nothing.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

from posttrain.self_instruct.filters import Rejected
from posttrain.self_instruct.tasks import Task

THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
SEPARATOR = re.compile(r"^[ \t]*###[ \t]*$", re.MULTILINE)
# Chat models like to set the names of fields in bold.
TASK_START = re.compile(r"^[ \t*]*(\d+)\.[ \t*]*Instruction:\**", re.MULTILINE)
LIST_ITEM = re.compile(r"^[ \t]*(\d+)\.[ \t]+", re.MULTILINE)
NO_INPUT = re.compile(r"<no ?input>", re.IGNORECASE)
INSTANCE_START = re.compile(r"^[ \t]*Example \d+[:.]?[ \t]*$", re.MULTILINE)
INPUT_FIRST = re.compile(r"\s*Input:(?P<input>.*?)^[ \t]*Output:(?P<output>.*)", re.DOTALL | re.M)
LABEL_FIRST = re.compile(r"\s*Label:(?P<output>.*?)^[ \t]*Input:(?P<input>.*)", re.DOTALL | re.M)


class Item(NamedTuple):
    """One piece of an answer: its text, and what was found in it, or why it is rejected."""

    text: str
    found: Task | str | Rejected

    def accepted(self) -> Task | str:
        """The task or text that was found; raises the Rejected if there is none."""
        if isinstance(self.found, Rejected):
            raise self.found
        return self.found


def parse_tasks(text: str, *, is_cut: bool) -> list[Item]:
    """The tasks of an answer: `4. Instruction: … 4. Input: … 4. Output: … ###`.

    is_cut: the answer ended by length, so its last item is not whole. Words before the first
    task are not an item, unless there is none at all.
    """
    pieces = []
    for part in SEPARATOR.split(THOUGHTS.sub("", text)):
        starts = [match.start() for match in TASK_START.finditer(part)]
        pieces += _cut_at(part, [0, *starts] if starts[:1] != [0] else starts)
    pieces = [piece.strip() for piece in pieces if piece.strip()]
    first = next((i for i, piece in enumerate(pieces) if TASK_START.match(piece)), 0)
    items = [Item(piece, _parse_task(piece)) for piece in pieces[first:]]
    if is_cut and items:
        cut = Rejected("truncated", "the answer ended by length within this item")
        items[-1] = items[-1]._replace(found=cut)
    return items or [Item(text, Rejected("unparsable", "an empty answer"))]


def _parse_task(piece: str) -> Task | Rejected:
    start = TASK_START.match(piece)
    if start is None:
        return Rejected("unparsable", "expected 'number. Instruction:'")
    number = rf"^[ \t*]*(?:{start[1]}\.[ \t*]*)?"
    fields = re.compile(
        rf"(?P<instruction>.*?){number}Input:\**(?P<input>.*?){number}Output:\**(?P<output>.*)",
        re.DOTALL | re.MULTILINE,
    ).fullmatch(piece, start.end())
    if fields is None:
        return Rejected("unparsable", f"expected '{start[1]}. Input:' and '{start[1]}. Output:'")
    texts = {name: value.strip() for name, value in fields.groupdict().items()}
    if not texts["instruction"]:
        return Rejected("unparsable", "an empty instruction")
    return Task(**{**texts, "input": without_no_input(texts["input"])})


def parse_instructions(text: str, *, is_cut: bool) -> list[Item]:
    """The instructions of an answer, one each: `9. …`. If the answer was cut, none is taken."""
    text = THOUGHTS.sub("", text)
    starts = [match.start() for match in LIST_ITEM.finditer(text)]
    items = []
    for piece in _cut_at(text, starts):
        instruction = " ".join(LIST_ITEM.sub("", piece, count=1).split())
        found: str | Rejected = instruction or Rejected("unparsable", "an empty instruction")
        if is_cut:
            found = Rejected("truncated", "the answer ended by length")
        items.append(Item(piece.strip(), found))
    return items or [Item(text, Rejected("unparsable", "no numbered instruction"))]


def parse_type(text: str) -> bool:
    """True if the answer says that the task is a classification; Rejected if it says neither."""
    words = re.findall(r"[a-z]+", THOUGHTS.sub("", text).lower())
    if not words or words[0] not in ("yes", "no"):
        raise Rejected("type unclear", f"expected Yes or No, found {text.strip()[:40]!r}")
    return words[0] == "yes"


def parse_instances(text: str, *, is_classification: bool, is_cut: bool) -> list[Item]:
    """The instances of an answer: `Example 1`, then `Input:` and `Output:`.

    In a classification `Label:` comes first, then `Input:`. The tasks among the items have an empty
    instruction. A cut answer loses its last instance.
    """
    form = LABEL_FIRST if is_classification else INPUT_FIRST
    order = "'Label:' and 'Input:'" if is_classification else "'Input:' and 'Output:'"
    items = []
    for piece in INSTANCE_START.split(THOUGHTS.sub("", text)):
        if not piece.strip():
            continue
        fields = form.fullmatch(piece)
        found: Task | Rejected = Rejected("unparsable", f"expected {order}")
        if fields is not None:
            paired_input = without_no_input(fields["input"].strip())
            found = Task("", paired_input, fields["output"].strip())
        items.append(Item(piece.strip(), found))
    if is_cut and items:
        items[-1] = items[-1]._replace(found=Rejected("truncated", "the answer ended by length"))
    return items or [Item(text, Rejected("unparsable", "an empty answer"))]


def without_no_input(text: str) -> str:
    """The text, or the empty text for the literal `<noinput>`."""
    return "" if NO_INPUT.fullmatch(text) else text


def _cut_at(text: str, starts: list[int]) -> list[str]:
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]
