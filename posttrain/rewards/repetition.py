"""Repetition: what share of an answer's n-grams has been there before? Does it end in a loop?

    ngram_repetition([1, 2, 3, 1, 2, 3], ngram_size=3)            # 0.25
    ends_in_loop([1, 2, 3, 2, 3, 2, 3], num_tokens=6)              # True
    rewards = {"correct": (math_reward, 1.0), "repeats": (repetition_penalty, 0.5)}

On token ids, so that it depends on no language. Honest text repeats short n-grams as well, the more
the longer it is. At 3 tokens, as in open-r1, GSM8K's own solutions have a share of 0.16, some of
0.41 (of words and signs), and 200 of them in a row 0.41; at 20 all have less than 0.08, most 0. A
loop comes near 1 at either.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.rewards.pieces import per_answer
from posttrain.rewards.text import Completion


def ngram_repetition(token_ids: Sequence[int], *, ngram_size: int) -> float:
    """1 - distinct / all n-grams of `ngram_size` neighbouring tokens, in [0, 1).

    0 where each n-gram stands once, and where the answer is shorter than one; near 1 for a loop.
    `ngram_size` is at least 1 (words); large ones see only passages copied as they are.
    1 2 3 1 2 3 has the trigrams 123, 231, 312, 123: three distinct of four, so 0.25.

    Source: "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373), appendix C.2; as a
    share of the whole answer, as in open-r1.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size: expected at least 1, found {ngram_size}")
    num_ngrams = len(token_ids) - ngram_size + 1
    if num_ngrams < 1:
        return 0.0
    shifted = (token_ids[start : start + num_ngrams] for start in range(ngram_size))
    return 1.0 - len(set(zip(*shifted, strict=True))) / num_ngrams


@per_answer
def repetition_penalty(
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    ngram_size: int = 20,
    **_columns: object,
) -> list[float]:
    """Minus the `ngram_repetition` of each answer: 0 down to nearly -1. Its weight is above 0."""
    return [
        -ngram_repetition(ids, ngram_size=ngram_size)
        for _, ids in zip(completions, completion_ids, strict=True)
    ]


def ends_in_loop(token_ids: Sequence[int], *, num_tokens: int, min_copies: int = 3) -> bool:
    """Whether the last `num_tokens` tokens are one block over and over, `min_copies` times or more.

    Exact copies, so a count or a list that goes on is no loop; the last copy may be cut short.
    `num_tokens` of at least `min_copies`: the longest block that is seen has
    `num_tokens // min_copies` tokens, and shorter answers end in none.
    1 2 3 2 3 2 3 ends in a loop of 6 tokens, 2 3 three times, not in one of 7.
    """
    if not 2 <= min_copies <= num_tokens:
        raise ValueError(
            f"expected 2 <= min_copies <= num_tokens; found min_copies={min_copies}, "
            f"num_tokens={num_tokens}"
        )
    tail = list(token_ids[-num_tokens:])
    if len(tail) < num_tokens:
        return False
    periods = range(1, num_tokens // min_copies + 1)
    return any(tail[period:] == tail[:-period] for period in periods)


@per_answer
def loop_penalty(
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    num_tokens: int,
    **_columns: object,
) -> list[float]:
    """-1 for an answer that `ends_in_loop` of `num_tokens`, else 0. Its weight is above 0."""
    return [
        -1.0 if ends_in_loop(ids, num_tokens=num_tokens) else 0.0
        for _, ids in zip(completions, completion_ids, strict=True)
    ]
