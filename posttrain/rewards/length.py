"""Length rewards, in tokens: DAPO's soft overlong penalty, Kimi k1.5's length reward.

    rewards = {"correct": (math_reward, 1.0),
               "short": (partial(soft_overlong_reward, max_tokens=1024, cache_tokens=256), 1.0)}

Lengths count the completion's ids as the trainer passes them, end-of-sequence token included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from posttrain.rewards.math import Gold, Verdict, verify_math
from posttrain.rewards.text import Completion, completion_text


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


def soft_overlong_reward(
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    max_tokens: int,
    cache_tokens: int,
    **_columns: object,
) -> list[float]:
    """`soft_overlong_penalty` of each answer. Bind the two limits with `functools.partial`."""
    lengths = [len(ids) for _, ids in zip(completions, completion_ids, strict=True)]
    return [
        soft_overlong_penalty(length, max_tokens=max_tokens, cache_tokens=cache_tokens)
        for length in lengths
    ]


def kimi_length(
    completions: Sequence[Completion],
    *,
    prompts: Sequence[object],
    completion_ids: Sequence[Sequence[int]],
    answer: Sequence[Gold],
    verify: Callable[[Gold, str], Verdict] = verify_math,
    **_columns: object,
) -> list[float | None]:
    """`kimi_length_reward` within each run of equal neighbouring prompts.

    So a prompt's answers must stand together in one call. `verify` decides which are correct: give
    it the same options as the accuracy reward's. None for a gold that cannot be read.
    """
    rows = zip(prompts, completions, completion_ids, answer, strict=True)
    rewards: list[float | None] = []
    for _, group in groupby(rows, key=lambda row: row[0]):
        _, texts, ids, golds = zip(*group, strict=True)
        scores = [verify(g, completion_text(c)).score for g, c in zip(golds, texts, strict=True)]
        shares = kimi_length_reward([len(i) for i in ids], [score == 1.0 for score in scores])
        rewards += [None if s is None else r for r, s in zip(shares, scores, strict=True)]
    return rewards
