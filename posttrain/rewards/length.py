"""Length rewards, in tokens: DAPO's soft overlong penalty, a cosine of the length, Kimi k1.5's.

    correct = partial(math_reward, prefilled_think=True)
    overlong = partial(soft_overlong_reward, max_tokens=1024, cache_tokens=256)
    short = partial(kimi_length, accuracy=correct)
    rewards = {"correct": (correct, 1.0), "overlong": (overlong, 1.0), "short": (short, 0.2)}

Lengths count the completion's ids as the trainer passes them, end-of-sequence token included. An
`accuracy` is called with the columns that its signature has, as if it stood alone.

A reward for answers that end: a cut answer is worth less, whatever a reward model reads in it.

rewards = {"score": (reward_model, 1.0), "end": (partial(missing_eos, stop_ids=ids), 1.0)}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any

from posttrain.rewards.math import math_reward
from posttrain.rewards.pieces import accepted, per_answer
from posttrain.rewards.text import Completion

Accuracy = Callable[..., Sequence[float | None]]  # a reward; it gets what these get


def soft_overlong_penalty(num_tokens: int, *, max_tokens: int, cache_tokens: int) -> float:
    """DAPO's penalty of an answer's length, in [-1, 0]; to be added to the reward.

    0 up to `max_tokens - cache_tokens`, then falling in a line to -1 at `max_tokens`, -1 beyond.
    `cache_tokens` (over 0, at most `max_tokens`) is the width of the slope: 1 is a step.
    With 100 and 20, 90 tokens cost -0.5. Published: 20,480 and 4,096.

    Source: DAPO (arXiv 2503.14476), equation 13.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(
            f"cache_tokens must lie between 1 and max_tokens; found cache_tokens={cache_tokens}, "
            f"max_tokens={max_tokens}"
        )
    excess = num_tokens - (max_tokens - cache_tokens)
    return max(min(-excess / cache_tokens, 0.0), -1.0)


def cosine_length_reward(
    num_tokens: int,
    is_correct: bool,
    *,
    max_tokens: int,
    if_correct: tuple[float, float] = (1.0, 0.5),
    if_wrong: tuple[float, float] = (-1.0, -0.5),
) -> float:
    """Correctness, worth more or less with the answer's length: short when right, long when wrong.

    Each pair gives the reward at length 0 and from `max_tokens` (above 0) on; between them it
    follows half a cosine. Beyond `max_tokens` it stays, where an unclamped cosine would turn back.
    At `max_tokens` 100: 50 tokens are worth 0.75 or -0.75, 100 and more 0.5 or -0.5.

    A wrong answer gains by going on, so this wants a penalty for what is cut or repeated beside
    it; the paper gives answers that reach the limit a reward of their own, -10.

    Source: "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373), appendix C.1, with
    2 to 1 if correct, -10 to 0 if wrong; the defaults are open-r1's.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, found {max_tokens}")
    at_zero, at_max = if_correct if is_correct else if_wrong
    progress = min(num_tokens / max_tokens, 1.0)
    return at_max + (at_zero - at_max) * (1.0 + math.cos(math.pi * progress)) / 2.0


def kimi_length_reward(num_tokens: Sequence[int], correct: Sequence[bool]) -> list[float]:
    """Kimi's length reward for the answers to one prompt, each in [-0.5, 0.5].

    lambda = 0.5 - (length - min) / (max - min), with minimum and maximum over all of the prompt's
    answers, wrong ones included. A correct answer gets lambda, a wrong one min(0, lambda): being
    short is no merit there. 0 where all lengths are equal.
    Lengths 100, 200, 300, all correct: 0.5, 0, -0.5.

    Source: Kimi k1.5 (arXiv 2501.12599), section 2.3.3.
    """
    shortest, longest = min(num_tokens), max(num_tokens)
    if shortest == longest:
        return [0.0] * len(num_tokens)
    rewards = []
    for length, is_correct in zip(num_tokens, correct, strict=True):
        share = 0.5 - (length - shortest) / (longest - shortest)
        rewards.append(share if is_correct else min(0.0, share))
    return rewards


def kimi_length_warmup(step: int, *, start_step: int, weight: float) -> float:
    """The length reward's weight at `step`: 0 before `start_step`, then `weight`.

    Two phases, not a ramp: the paper trains without the length penalty first, because it slows
    the start, then with a constant one.
    """
    return weight if step >= start_step else 0.0


@per_answer
def soft_overlong_reward(
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    max_tokens: int,
    cache_tokens: int,
    **_columns: object,
) -> list[float]:
    """`soft_overlong_penalty` of each answer. Bind the two limits with `functools.partial`."""
    return [
        soft_overlong_penalty(len(ids), max_tokens=max_tokens, cache_tokens=cache_tokens)
        for _, ids in zip(completions, completion_ids, strict=True)
    ]


@per_answer
def cosine_length(
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    max_tokens: int,
    accuracy: Accuracy = math_reward,
    if_correct: tuple[float, float] = (1.0, 0.5),
    if_wrong: tuple[float, float] = (-1.0, -0.5),
    **columns: object,
) -> list[float | None]:
    """`cosine_length_reward` of each answer, in place of the accuracy reward, which it contains.

    `accuracy` decides which answers are correct: those that it gives 1. None where it has None.
    """
    values = {"max_tokens": max_tokens, "if_correct": if_correct, "if_wrong": if_wrong}
    given = {"completions": completions, "completion_ids": completion_ids, **columns}
    scores = accuracy(**accepted(accuracy, given))
    return [
        None if score is None else cosine_length_reward(len(ids), score == 1.0, **values)
        for score, ids in zip(scores, completion_ids, strict=True)
    ]


def kimi_length(
    completions: Sequence[Completion],
    *,
    prompts: Sequence[object],
    completion_ids: Sequence[Sequence[int]],
    accuracy: Accuracy = math_reward,
    **columns: object,
) -> list[float | None]:
    """`kimi_length_reward` within each run of equal neighbouring prompts.

    So a prompt's answers must stand together in one call. `accuracy`, the reward beside which this
    stands, decides which are correct: those that it gives 1. None where it has None.
    """
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    scores = accuracy(**accepted(accuracy, given | columns))
    rows = zip(prompts, map(len, completion_ids), scores, strict=True)
    rewards: list[float | None] = []
    for _, group in groupby(rows, key=lambda row: row[0]):
        _, lengths, group_scores = zip(*group, strict=True)
        shares = kimi_length_reward(lengths, [score == 1.0 for score in group_scores])
        rewards += [
            None if score is None else share
            for share, score in zip(shares, group_scores, strict=True)
        ]
    return rewards


def kimi_length_with_warmup(
    completions: Sequence[Completion],
    *,
    prompts: Sequence[object],
    completion_ids: Sequence[Sequence[int]],
    trainer_state: Any,
    start_step: int,
    accuracy: Accuracy = math_reward,
    **columns: object,
) -> list[float | None]:
    """`kimi_length` times `kimi_length_warmup`: nothing before the optimizer step `start_step`.

    The step is `trainer_state.global_step`, which TRL hands to rewards that ask for it. Such a
    reward runs in the trainer's own process, so take `kimi_length` where no warm-up is wanted.
    """
    if not kimi_length_warmup(trainer_state.global_step, start_step=start_step, weight=1.0):
        return [0.0] * len(completions)
    return kimi_length(
        completions,
        prompts=prompts,
        completion_ids=completion_ids,
        accuracy=accuracy,
        trainer_state=trainer_state,
        **columns,
    )


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
