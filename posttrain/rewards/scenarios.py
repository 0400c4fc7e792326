"""Rewards for a data set of several kinds of prompts, each of which has rewards of its own.

    accuracy = partial(reward_where, reward=math_reward, column="kind", value="reasoning")
    rewards = {"accuracy": (accuracy, 1.0), "format": (think_answer_or_plain, 0.2), …}
    avoids_words(["You are a fool."], words=["fool"])                      # [0.0]

DeepSeek-R1 (arXiv 2501.12948, section 2.3.4) trains on reasoning prompts with rules and on general
prompts with reward models in one batch. A completion's total is a sum over all rewards, so the
reward of another kind of prompt is 0 there, the same for the whole group, and moves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from posttrain.rewards.format import THINK_ANSWER_TAGS, is_think_answer
from posttrain.rewards.pieces import Reward, Values, accepted, innermost, per_completion
from posttrain.rewards.text import Completion, whole_texts


def reward_where(
    completions: Sequence[Completion],
    *,
    reward: Reward,
    column: str,
    value: object,
    **columns: object,
) -> Values:
    """Apply `reward` to the completions in whose row `column` is `value`; 0.0 for all others.

    Args:
        reward: Called as usual, with those completions alone.
        column: A column of the data, N values.
    """
    given = {"completions": completions, **columns}
    rows = [row for row, found in enumerate(columns[column]) if found == value]
    scores: list[float | None] = [0.0] * len(completions)
    if not rows:
        return scores
    size = len(completions)
    chosen = {name: _at(rows, values, size) for name, values in given.items()}
    for row, score in zip(rows, reward(**accepted(reward, chosen)), strict=True):
        scores[row] = score
    return scores


def _at(rows: Sequence[int], values: object, size: int) -> object:
    """Select those rows of a column; what is not one value per completion stays as it is."""
    is_column = isinstance(values, Sequence) and len(values) == size
    return [values[row] for row in rows] if is_column else values


def _unscorable_where(
    *, reward: Reward, column: str, value: object, **columns: Sequence[object]
) -> Iterator[tuple[int, str]]:
    """Ask the reward about its own rows."""
    find = getattr(innermost(reward), "find_unscorable", None)
    if find is None or column not in columns:
        return
    rows = [row for row, found in enumerate(columns[column]) if found == value]
    chosen = {name: [values[row] for row in rows] for name, values in columns.items()}
    for row, problem in find(**accepted(find, chosen)):
        yield rows[row], problem


reward_where.find_unscorable = _unscorable_where


@per_completion
def think_answer_or_plain(
    completions: Sequence[Completion],
    *,
    prompts: Sequence[object] | None = None,
    **_columns: object,
) -> list[float]:
    """Score 1.0 for the think/answer shape, and for text without any tag: an answer that needs no
    thought; else 0.0."""
    return [
        float(is_think_answer(text) or _is_plain(text))
        for text in whole_texts(completions, prompts)
    ]


def _is_plain(text: str) -> bool:
    return bool(text.strip()) and not any(tag in text for tag in THINK_ANSWER_TAGS)


@per_completion
def avoids_words(
    completions: Sequence[Completion], *, words: Sequence[str], **_columns: object
) -> list[float]:
    """Score 0.0 for each completion in which one of the words stands, thought included; else 1.0.

    Capitals make no difference. It is a stand-in for a model that judges harm: a list of words
    finds neither other spellings nor harm without them.
    """
    harmful = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
    return [float(not harmful.search(text)) for text in whole_texts(completions)]
