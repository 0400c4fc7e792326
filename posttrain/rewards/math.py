"""Is the answer to a maths problem right? Exact, without evaluating anything the model wrote.

    verify_math("18", "<think>3 * 6</think><answer>18.0</answer>")   # Verdict(1.0, "equal numbers")
    rewards = {"correct": (math_reward, 1.0)}                        # the data's column is `answer`

Decided: equal texts after normalising their spelling, and numbers (integers, decimals, fractions,
mixed numbers, percent, powers of ten) as exact fractions. Not decided, and so worth 0: whatever
needs algebra ("2^3" against 8, "x + 1" against "1 + x"), units ("18 dollars" against 18) and sets
in another order.

A number is matched by one number only: never by a list, a range, an inequality, or boxes that
differ. "50%" is 0.5 and 1/2, and is not 50.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from posttrain.rewards.extraction import after_hashes, boxed, extract_answers
from posttrain.rewards.normalise import normalise, text_key
from posttrain.rewards.numerals import read_number
from posttrain.rewards.text import Completion, completion_text

Gold = str | int | float | None
MAX_ANSWER_CHARS = 2_000  # longer is no final answer, and bounds the work on one

_SEVERAL_VALUES = re.compile(
    r"[,;<>≤≥≠±]|\\(?:pm|mp|leq?|geq?|neq?|lt|gt|in|cup)(?![A-Za-z])|\b(?:or|and|to|between)\b"
)


class Verdict(NamedTuple):
    """`score`: 1.0 right, 0.0 not shown to be right, None where the gold cannot be read."""

    score: float | None
    reason: str


def read_gold(gold: str) -> str:
    """The final answer of a gold, normalised: what follows `####`, else what is boxed, else all."""
    if "####" in gold:
        gold = after_hashes(gold)
    if boxes := boxed(gold):
        gold = boxes[-1]
    return normalise(gold) if len(gold) <= MAX_ANSWER_CHARS else ""


def compare_answers(gold: str, answer: str) -> Verdict:
    """Do two normalised final answers mean the same?"""
    gold_number, number = read_number(gold), read_number(answer)
    if gold_number is not None and number is not None:
        if gold_number == number:
            return Verdict(1.0, "equal numbers")
        return Verdict(0.0, "different numbers")
    if gold_number is None and text_key(gold) == text_key(answer):
        return Verdict(1.0, "equal text")
    if gold_number is not None and _SEVERAL_VALUES.search(answer):
        return Verdict(0.0, "not one value")
    return Verdict(0.0, "not decided: differs as text")


def verify_math(
    gold: Gold,
    completion: str,
    *,
    prefilled_think: bool = False,
    allow_hashes: bool = False,
    allow_last_number: bool = False,
) -> Verdict:
    """Judge one completion against the gold answer. Never raises on text, linear in its length.

    Args:
        gold: The final answer, or a worked one that ends in `#### 18` or in a `\\boxed{18}`.
        completion: The model's text. The options say where its answer stands: see
            `extraction.extract_answers`.

    Returns:
        The score and the rule that decided it. An empty gold, or one that holds more than
        `MAX_ANSWER_CHARS` of text, has score None.
    """
    wanted = read_gold(str(gold)) if isinstance(gold, (str, int, float)) else ""
    if not wanted:
        return Verdict(None, "gold cannot be read: empty, too long, or not text")
    found, problem = extract_answers(
        completion,
        prefilled_think=prefilled_think,
        allow_hashes=allow_hashes,
        allow_last_number=allow_last_number,
    )
    if problem:
        return Verdict(0.0, f"no answer: {problem}")
    if max(map(len, found)) > MAX_ANSWER_CHARS:
        return Verdict(0.0, f"refused: over {MAX_ANSWER_CHARS} characters")
    answer, *others = map(normalise, dict.fromkeys(reversed(found)))  # the last one first
    if not answer:
        return Verdict(0.0, "no answer: empty")
    if any(compare_answers(answer, other).score != 1.0 for other in others):
        return Verdict(0.0, "several boxes that differ")
    return compare_answers(wanted, answer)


def math_reward(
    completions: Sequence[Completion],
    *,
    answer: Sequence[Gold],
    prefilled_think: bool = False,
    allow_hashes: bool = False,
    allow_last_number: bool = False,
    **_columns: object,
) -> list[float | None]:
    """`verify_math` of each completion against the data's column `answer`.

    Bind the options with `functools.partial`. For a column of another name, wrap it:
    `lambda completions, solution, **_: math_reward(completions, answer=solution)`.
    """
    return [
        verify_math(
            gold,
            completion_text(completion),
            prefilled_think=prefilled_think,
            allow_hashes=allow_hashes,
            allow_last_number=allow_last_number,
        ).score
        for gold, completion in zip(answer, completions, strict=True)
    ]
