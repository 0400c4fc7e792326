"""Filters: what is not kept, and why. The rules are Self-Instruct's and Alpaca's; see REASONS.

    check_instruction("Sort numbers quickly", ALPACA_BLACKLIST)    # Rejected: too short

Instructions: more than 3 and at most 150 words, no word that asks for what a text model cannot
do, not "Write a program …" (each would be in another language), not begun with punctuation or
outside ASCII. Instances: an output, not the input again, nothing that breaks off at a colon.
Source: github.com/yizhongw/self-instruct and github.com/tatsu-lab/stanford_alpaca.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

MIN_WORDS, MAX_WORDS = 4, 150
PROGRAM = "Write a program"

# Whole words, in any case. Alpaca's list goes on where Self-Instruct's ends.
SELF_INSTRUCT_BLACKLIST = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files"),
    *("map", "maps", "draw", "plot", "go to"),
)
ALPACA_BLACKLIST = (
    *SELF_INSTRUCT_BLACKLIST,
    *("video", "audio", "music", "flowchart", "diagram"),
)

# In the order in which the report shows them.
REASONS = (
    "truncated",
    "unparsable",
    "too short",
    "too long",
    "blacklisted word",
    "starts with 'Write a program'",
    "starts with punctuation",
    "starts outside ASCII",
    "too similar",
    "no output",
    "output is the input",
    "ends with a colon",
    "same input, different outputs",
    "repeated instance",
    "type unclear",
)


class Rejected(Exception):
    """Raised for what is not kept, with one of REASONS and what exactly was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def check_instruction(instruction: str, blacklist: Sequence[str]) -> None:
    """Raise Rejected for an instruction that breaks a rule.

    By hand: `Sort numbers quickly` has 3 words, one too few.
    """
    num_words = len(instruction.split())
    if num_words < MIN_WORDS:
        raise Rejected("too short", f"{num_words} words, at least {MIN_WORDS} are needed")
    if num_words > MAX_WORDS:
        raise Rejected("too long", f"{num_words} words, at most {MAX_WORDS} are allowed")
    for word in blacklist:
        if re.search(rf"\b{re.escape(word)}\b", instruction, re.IGNORECASE):
            raise Rejected("blacklisted word", word)
    if instruction.startswith(PROGRAM):
        raise Rejected("starts with 'Write a program'")
    if instruction[0] in string.punctuation:
        raise Rejected("starts with punctuation", instruction[0])
    if not instruction[0].isascii():
        raise Rejected("starts outside ASCII", instruction[0])


def check_instance(paired_input: str, output: str) -> None:
    """Raise Rejected for an instance that no one should learn from."""
    if not output:
        raise Rejected("no output")
    if output == paired_input:
        raise Rejected("output is the input")
    for name, text in (("input", paired_input), ("output", output)):
        if text.endswith(":"):
            raise Rejected("ends with a colon", name)


def check_contradiction(instances: Sequence[tuple[str, str]]) -> None:
    """Raise Rejected if the same input, unless empty, has two different outputs.

    The whole task goes then: nobody knows which of its outputs are right.
    """
    outputs: dict[str, str] = {}
    for paired_input, output in instances:
        if paired_input and outputs.setdefault(paired_input, output) != output:
            raise Rejected("same input, different outputs", paired_input[:60])
