"""Format rewards: has the answer the think/answer shape of R1-Zero?

    is_think_answer("<think>6 * 7</think> <answer>42</answer>")   # True
    think_answer_format(["42"])                                   # [0.0]
    tag_score("<think>6 * 7</think> 42")                          # 0.5

The shape is DeepSeek-R1's (arXiv 2501.12948, table 1). Checked with counts and searches instead of
a regular expression: linear time on any text, and nothing may trail behind a line's end.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.rewards.pieces import per_answer
from posttrain.rewards.text import Completion, completion_text

THINK_ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def is_think_answer(text: str, *, prefilled_think: bool = False) -> bool:
    """Is the text exactly `<think>…</think><answer>…</answer>`?

    Each tag once and in this order, both bodies not blank, only white space outside and between.
    With `prefilled_think` the prompt's template ended in `<think>`, so the text must not repeat it.
    """
    if prefilled_think:
        text = "<think>" + text
    if any(text.count(tag) != 1 for tag in THINK_ANSWER_TAGS):
        return False
    pieces = []
    for tag in THINK_ANSWER_TAGS:
        piece, found, text = text.partition(tag)
        if not found:  # it stands before an earlier tag
            return False
        pieces.append(piece.strip())
    before, thought, between, answer = pieces
    return bool(thought and answer) and not (before or between or text.strip())


def has_think(text: str, *, prefilled_think: bool = False) -> bool:
    """Does the text open with its only `<think>` and close it? What follows, or is inside, is free.

    The lenient check, equal to that of TRL's `think_format_reward`.
    """
    if prefilled_think:
        text = "<think>" + text
    return text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text


def tag_score(text: str, *, prefilled_think: bool = False) -> float:
    """A quarter for each of the four tags that stands once, and behind those that count before it.

    A step on the way to `is_think_answer`: a tag that is repeated or out of order pays nothing, and
    what stands between the tags is free, so weigh it less than the whole shape.
    With `prefilled_think` the first quarter is every answer's that does not repeat the tag.
    `<think>a</think>b` has 0.5, `<answer>b</answer><think>a</think>` too: two tags are in place.
    """
    if prefilled_think:
        text = "<think>" + text
    num_in_place, behind = 0, 0
    for tag in THINK_ANSWER_TAGS:
        position = text.find(tag, behind)
        if position >= 0 and text.count(tag) == 1:
            num_in_place, behind = num_in_place + 1, position
    return num_in_place / len(THINK_ANSWER_TAGS)


@per_answer
def think_answer_format(
    completions: Sequence[Completion], *, prefilled_think: bool = False, **_columns: object
) -> list[float]:
    """1.0 for each answer that `is_think_answer`, else 0.0."""
    texts = map(completion_text, completions)
    return [float(is_think_answer(text, prefilled_think=prefilled_think)) for text in texts]


@per_answer
def think_format(
    completions: Sequence[Completion], *, prefilled_think: bool = False, **_columns: object
) -> list[float]:
    """1.0 for each answer that `has_think`, else 0.0."""
    texts = map(completion_text, completions)
    return [float(has_think(text, prefilled_think=prefilled_think)) for text in texts]


@per_answer
def tag_count(
    completions: Sequence[Completion], *, prefilled_think: bool = False, **_columns: object
) -> list[float]:
    """`tag_score` of each answer."""
    texts = map(completion_text, completions)
    return [tag_score(text, prefilled_think=prefilled_think) for text in texts]
