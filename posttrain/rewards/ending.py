"""A reward for answers that end: a cut answer is worth less, whatever a reward model reads in it.

rewards = {"score": (reward_model, 1.0), "end": (partial(missing_eos, stop_ids=ids), 1.0)}
"""

from collections.abc import Collection, Sequence
from typing import Any


def missing_eos(
    completion_ids: Sequence[Sequence[int]], *, stop_ids: Collection[int], **_: Any
) -> list[float]:
    """-1 for an answer whose last token is none of `stop_ids`, else 0.

    Its weight in the table of rewards is the penalty. A reward model has seen whole answers only:
    its score of a cut one means little. By hand: stop_ids {1}, answers (5, 1) and (5, 7) give 0
    and -1. Source: TRL's PPO, `missing_eos_penalty`; openai/lm-human-preferences overwrites the
    score instead.
    """
    return [0.0 if ids and ids[-1] in stop_ids else -1.0 for ids in completion_ids]
