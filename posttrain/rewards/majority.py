r"""Votes for answers: completions whose final answers are mathematically equal vote alike.

    group_answers(["\\boxed{1/2}", "no idea", "\\boxed{0.5}", "\\boxed{2}"])  # [0, None, 0, 1]

Equality is that of the maths reward (`posttrain.rewards.math`), with nothing for a gold: the first
completion of a group takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.maths.normalise import normalise
from posttrain.rewards.math import MAX_ANSWER_CHARS, equal_answers
from posttrain.rewards.text import Completion, final_answers, whole_texts


def group_answers(
    completions: Sequence[Completion], prompts: Sequence[object] | None = None
) -> list[int | None]:
    """Number the groups of equal final answers, in the order of their first completion.

    An answer joins the first group whose first answer it equals. A completion without a final
    answer (see `posttrain.rewards.text`), or with one of more than MAX_ANSWER_CHARS characters, has
    None. Blocks for algebra.

    Args:
        completions: One problem's completions.
        prompts: The rendered prompts, one each; one that ends in `<think>` opens a thought.
    """
    numbers: dict[str, int] = {}  # of every spelling that was met
    first: list[str] = []  # answer of each group
    found: list[int | None] = []
    for text in whole_texts(completions, prompts):
        answer = _answer(text)
        if answer and answer not in numbers:
            equal = (n for n, known in enumerate(first) if equal_answers(known, answer))
            numbers[answer] = next(equal, len(first))
            first += [answer] * (numbers[answer] == len(first))
        found.append(numbers[answer] if answer else None)
    return found


def _answer(text: str) -> str:
    """The final answer, normalised; several boxes are a list unless they agree; "" without one."""
    found, problem = final_answers(text)
    if problem or sum(map(len, found)) > MAX_ANSWER_CHARS:
        return ""
    texts = list(dict.fromkeys(map(normalise, found)))
    if all(equal_answers(texts[-1], other) for other in texts[:-1]):
        return texts[-1]
    return ", ".join(texts)
