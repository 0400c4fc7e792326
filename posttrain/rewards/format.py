"""Format rewards: whether a completion has the think/answer shape of R1-Zero.

    is_think_answer("<think>6 * 7</think> <answer>42</answer>")   # True
    think_answer_format(["42"])                                   # [0.0]
    tag_score("<think>6 * 7</think> 42")                          # 0.5

The shape is DeepSeek-R1's (arXiv 2501.12948, table 1). It is checked with counts and searches
instead of a regular expression: in linear time on any text, and with nothing left to trail the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.rewards.pieces import note_rules, per_completion
from posttrain.rewards.text import Completion, whole_texts

THINK_ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def is_think_answer(text: str, *, prefilled_think: bool = False) -> bool:
    """Tell whether the text is exactly `<think>…</think><answer>…</answer>`.

    Each tag occurs once and in this order, no body is blank, and only white space stands outside
    and between. With `prefilled_think` the prompt's template ended in `<think>`, so the text must
    not repeat it.
    """
    return not think_answer_fault(text, prefilled_think=prefilled_think)


def think_answer_fault(text: str, *, prefilled_think: bool = False) -> str:
    """Say why a text is not `is_think_answer`; nothing if it is."""
    if prefilled_think:
        text = "<think>" + text
    counts = {tag: text.count(tag) for tag in THINK_ANSWER_TAGS}
    for tag, count in counts.items():
        if count != 1:
            return f"{tag} is missing" if not count else f"{tag} stands there {count} times"
    pieces = []
    for tag in THINK_ANSWER_TAGS:
        piece, found, text = text.partition(tag)
        if not found:
            return f"{tag} stands before an earlier tag"
        pieces.append(piece.strip())
    before, thought, between, answer = pieces
    if not (thought and answer):
        return "empty answer" if thought else "empty thought"
    return "text outside of the tags" if before or between or text.strip() else ""


def has_think(text: str, *, prefilled_think: bool = False) -> bool:
    """Tell whether the text opens with its only `<think>` and closes it, whatever else it holds.

    This is the lenient check of TRL's `think_format_reward`.
    """
    if prefilled_think:
        text = "<think>" + text
    return text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text


def tag_score(text: str, *, prefilled_think: bool = False) -> float:
    """Score a quarter for each of the four tags that occurs once and after those counted before it.

    A step on the way to `is_think_answer`: a tag that is repeated or out of order scores nothing,
    and the text between the tags is free, so weigh it less than the whole shape. With
    `prefilled_think`, every completion that does not repeat the first tag gets its quarter.
    `<think>a</think>b` has 0.5, and so has `<answer>b</answer><think>a</think>`: two tags are in
    place.
    """
    if prefilled_think:
        text = "<think>" + text
    num_in_place, behind = 0, 0
    for tag in THINK_ANSWER_TAGS:
        position = text.find(tag, behind)
        if position >= 0 and text.count(tag) == 1:
            num_in_place, behind = num_in_place + 1, position
    return num_in_place / len(THINK_ANSWER_TAGS)


@per_completion
def think_answer_format(
    completions: Sequence[Completion],
    *,
    prompts: Sequence[object] | None = None,
    prefilled_think: bool | None = None,
    **_columns: object,
) -> list[float]:
    """Score 1.0 for each completion that `is_think_answer`, else 0.0."""
    texts = whole_texts(completions, prompts, prefilled_think=prefilled_think)
    faults = [think_answer_fault(text) for text in texts]
    note_rules([fault or "think, then answer" for fault in faults])
    return [float(not fault) for fault in faults]


@per_completion
def think_format(
    completions: Sequence[Completion],
    *,
    prompts: Sequence[object] | None = None,
    prefilled_think: bool | None = None,
    **_columns: object,
) -> list[float]:
    """Score 1.0 for each completion that `has_think`, else 0.0."""
    texts = whole_texts(completions, prompts, prefilled_think=prefilled_think)
    return [float(has_think(text)) for text in texts]


@per_completion
def tag_count(
    completions: Sequence[Completion],
    *,
    prompts: Sequence[object] | None = None,
    prefilled_think: bool | None = None,
    **_columns: object,
) -> list[float]:
    """Apply `tag_score` to each completion."""
    texts = whole_texts(completions, prompts, prefilled_think=prefilled_think)
    return [tag_score(text) for text in texts]
