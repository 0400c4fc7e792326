"""Length rewards, in tokens: DAPO's soft overlong penalty, a cosine of the length, Kimi k1.5's.

    correct = partial(math_reward, prefilled_think=True)
    overlong = partial(soft_overlong_reward, max_tokens=1024, cache_tokens=256)
    short = partial(kimi_length, accuracy=correct)
    rewards = {"correct": (correct, 1.0), "overlong": (overlong, 1.0), "short": (short, 0.2)}

Lengths count the completion's ids as the trainer passes them, end-of-sequence token included. An
`accuracy` is called with the columns that its signature has, like a reward of its own.

`missing_eos` is a penalty for completions that were cut off, whatever a reward model says of them:

    rewards = {"score": (reward_model, 1.0), "end": (partial(missing_eos, stop_ids=ids), 1.0)}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Protocol

from posttrain.rewards.math import math_reward
from posttrain.rewards.pieces import accepted, per_completion
from posttrain.rewards.text import Completion

Accuracy = Callable[..., Sequence[float | None]]  # a reward that says which completions are right


class TrainerState(Protocol):
    """The part of a trainer's state that these rewards read."""

    global_step: int


def soft_overlong_penalty(num_tokens: int, *, max_tokens: int, cache_tokens: int) -> float:
    """DAPO's penalty on a completion's length, in [-1, 0], which is added to the reward.

    It is 0 up to `max_tokens - cache_tokens`, then falls linearly to -1 at `max_tokens`, and stays.
    `cache_tokens` (above 0, at most `max_tokens`) is the width of the slope; 1 is a step.
    With 100 and 20, 90 tokens cost -0.5. Published: 20,480 and 4,096.

    Source: DAPO (arXiv 2503.14476), equation 13.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(
            f"expected 1 <= cache_tokens <= max_tokens; found cache_tokens={cache_tokens}, "
            f"max_tokens={max_tokens}."
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
    """Correctness scaled by length: best short if it is right, best long if it is wrong.

    Each pair gives the reward at length 0 and from `max_tokens` (above 0) on. Between them it
    follows half a cosine. Beyond `max_tokens` it stays, where an unclamped cosine would turn back.
    With `max_tokens` 100, 50 tokens score 0.75 or -0.75, and 100 or more 0.5 or -0.5.

    A wrong completion gains by going on, so combine this with penalties for truncation and
    repetition. The paper gives completions that reach the limit a separate reward, -10.

    Source: "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373), appendix C.1, with
    2 to 1 if correct, -10 to 0 if wrong; the defaults are open-r1's.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, found {max_tokens}.")
    at_zero, at_max = if_correct if is_correct else if_wrong
    progress = min(num_tokens / max_tokens, 1.0)
    return at_max + (at_zero - at_max) * (1.0 + math.cos(math.pi * progress)) / 2.0


def kimi_length_reward(num_tokens: Sequence[int], correct: Sequence[bool]) -> list[float]:
    """Kimi's length reward for the completions of one prompt, each in [-0.5, 0.5].

    lambda = 0.5 - (length - min) / (max - min), with minimum and maximum over all of the prompt's
    completions, wrong ones included. A correct completion gets lambda, a wrong one min(0, lambda),
    because being short is no merit there. If all lengths are equal, all get 0.
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

    These are two phases, not a ramp: the paper first trains without the length penalty, which slows
    the start, and then with a constant one.
    """
    return weight if step >= start_step else 0.0


@per_completion
def soft_overlong_reward(
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    max_tokens: int,
    cache_tokens: int,
    **_columns: object,
) -> list[float]:
    """Apply `soft_overlong_penalty` to each completion. Bind the limits with a partial."""
    return [
        soft_overlong_penalty(len(ids), max_tokens=max_tokens, cache_tokens=cache_tokens)
        for _, ids in zip(completions, completion_ids, strict=True)
    ]


@per_completion
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
    """Apply `cosine_length_reward` to each completion, in place of an accuracy reward.

    A completion is correct if `accuracy` gives it 1. It has no score if `accuracy` gives it None.
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
    """Apply `kimi_length_reward` to the completions of each prompt.

    A prompt's completions must be neighbours in one call. `accuracy`, the reward that stands beside
    this one, decides which are correct: those that it gives 1. A completion has no score if
    `accuracy` gives it None.
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
    trainer_state: TrainerState,
    start_step: int,
    accuracy: Accuracy = math_reward,
    **columns: object,
) -> list[float | None]:
    """Multiply `kimi_length` by `kimi_length_warmup`: 0 before the optimizer step `start_step`.

    The step is `trainer_state.global_step`, which TRL passes to rewards that ask for it. Such a
    reward runs in the trainer's own process, so use `kimi_length` if you want no warm-up.
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
    completion_ids: Sequence[Sequence[int]], *, stop_ids: Collection[int], **_columns: object
) -> list[float]:
    """Score -1 for a completion whose last token is not one of `stop_ids`, else 0.

    Its weight in the table of rewards is the penalty. A reward model has seen whole completions
    only, so its score of a truncated one means little. By hand: with stop_ids {1}, the completions
    (5, 1) and (5, 7) score 0 and -1.

    Source: TRL's PPO, `missing_eos_penalty`. openai/lm-human-preferences overwrites the score
    instead.
    """
    return [0.0 if ids and ids[-1] in stop_ids else -1.0 for ids in completion_ids]
