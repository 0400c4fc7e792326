"""Repetition rewards: the share of n-grams that repeat earlier ones, and loops at the end.

    ngram_repetition([1, 2, 3, 1, 2, 3], ngram_size=3)            # 0.25
    ends_in_loop([1, 2, 3, 2, 3, 2, 3], num_tokens=6)              # True
    rewards = {"correct": (math_reward, 1.0), "repeats": (repetition_penalty, 0.5)}

They work on token ids, so that they depend on no language. Honest text repeats short n-grams too,
the more the longer it is. At 3 tokens, as in open-r1, GSM8K's own solutions have a share of 0.16,
some of 0.41 (of words and signs), and 200 of them in a row 0.41. At 20 tokens all have less than
0.08, most 0. A loop comes near 1 at either.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.rewards.pieces import per_completion
from posttrain.rewards.text import Completion


def ngram_repetition(token_ids: Sequence[int], *, ngram_size: int) -> float:
    """The share of repeated n-grams, 1 - distinct / all, of `ngram_size` tokens, in [0, 1).

    It is 0 if each n-gram occurs once or the completion is shorter than one, and near 1 for a loop.
    `ngram_size` is at least 1 (single tokens); with large ones, only copied passages count.
    1 2 3 1 2 3 has the trigrams 123, 231, 312, 123: three distinct of four, so 0.25.

    Source: "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373), appendix C.2; as a
    share of the whole completion, as in open-r1.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size: expected at least 1, found {ngram_size}.")
    num_ngrams = len(token_ids) - ngram_size + 1
    if num_ngrams < 1:
        return 0.0
    shifted = (token_ids[start : start + num_ngrams] for start in range(ngram_size))
    return 1.0 - len(set(zip(*shifted, strict=True))) / num_ngrams


@per_completion
def repetition_penalty(
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    ngram_size: int = 20,
    **_columns: object,
) -> list[float]:
    """Score minus the `ngram_repetition` of each completion. Give it a weight above 0."""
    return [
        -ngram_repetition(ids, ngram_size=ngram_size)
        for _, ids in zip(completions, completion_ids, strict=True)
    ]


def ends_in_loop(token_ids: Sequence[int], *, num_tokens: int, min_copies: int = 3) -> bool:
    """Tell whether the last `num_tokens` tokens are at least `min_copies` copies of one block.

    The copies are exact, so a count or a list that goes on is not a loop. The last copy may be cut
    short. `num_tokens` is at least `min_copies`: the longest block that can be found has
    `num_tokens // min_copies` tokens, and shorter completions end in no loop.
    1 2 3 2 3 2 3 ends in a loop of 6 tokens, 2 3 three times, not in one of 7.
    """
    if not 2 <= min_copies <= num_tokens:
        raise ValueError(
            f"expected 2 <= min_copies <= num_tokens; found min_copies={min_copies}, "
            f"num_tokens={num_tokens}."
        )
    tail = list(token_ids[-num_tokens:])
    if len(tail) < num_tokens:
        return False
    periods = range(1, num_tokens // min_copies + 1)
    return any(tail[period:] == tail[:-period] for period in periods)


@per_completion
def loop_penalty(
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    num_tokens: int,
    **_columns: object,
) -> list[float]:
    """Score -1 for a completion that `ends_in_loop` of `num_tokens`, else 0. Weigh it above 0."""
    return [
        -1.0 if ends_in_loop(ids, num_tokens=num_tokens) else 0.0
        for _, ids in zip(completions, completion_ids, strict=True)
    ]
