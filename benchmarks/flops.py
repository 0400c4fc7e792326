"""Useful floating-point operations of a piece of work, whoever does it and however.

Counted are products that the mathematics needs: each prompt once, no padding, the LM head at
scored tokens only, nothing recomputed. A product of (a, b) and (b, c) counts 2abc; a backward pass
counts twice its forward pass. Element-wise work, norms and the optimizer are not counted.
"""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.workload import Size


class Work(NamedTuple):
    """tokens: prompt and answer tokens, a shared prompt once. scored: tokens whose log-prob is
    wanted. seen: (query, key) pairs under the causal mask."""

    tokens: int
    scored: int
    seen: int

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def forward_flops(self, size: Size) -> int:
        layers = 2 * size.linear_parameters * self.tokens
        attention = 4 * size.hidden * size.layers * self.seen  # Q K^T and P V
        head = 2 * size.vocabulary * size.hidden * self.scored
        return layers + attention + head

    def training_flops(self, size: Size) -> int:
        return 3 * self.forward_flops(size)


def shared_prompt(prompt: int, answers: Sequence[int]) -> Work:
    """A prompt of so many tokens and answers to it, all of whose tokens are scored.

    By hand: a prompt of 2 with answers of 1 and 2 has 5 tokens, 3 of them scored, and
    3 + (2 + 1) + (4 + 3) = 13 pairs.
    """
    seen = prompt * (prompt + 1) // 2
    seen += sum(answer * prompt + answer * (answer + 1) // 2 for answer in answers)
    return Work(prompt + sum(answers), sum(answers), seen)


def total(parts: Sequence[Work]) -> Work:
    return sum(parts, Work(0, 0, 0))
