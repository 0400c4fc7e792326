"""Count the useful floating-point operations of a piece of work, whoever does it and however.

Counted are products that the mathematics needs: each prompt once, no padding, the LM head at
scored tokens only, nothing recomputed. A product of (a, b) and (b, c) counts 2abc; a backward pass
counts twice its forward pass. Element-wise work, norms and the optimizer are not counted.
"""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.workload import Size


class Work(NamedTuple):
    """A piece of work, in tokens.

    Attributes:
        tokens: Tokens of prompts and completions, a shared prompt once.
        scored: Tokens whose log-prob is wanted.
        seen: (query, key) pairs under the causal mask.
    """

    tokens: int
    scored: int
    seen: int

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def forward_flops(self, size: Size) -> int:
        """Count the operations of a forward pass."""
        layers = 2 * size.linear_parameters * self.tokens
        attention = 4 * size.hidden * size.layers * self.seen  # Q K^T and P V
        head = 2 * size.vocabulary * size.hidden * self.scored
        return layers + attention + head

    def training_flops(self, size: Size) -> int:
        """Count the operations of a forward and a backward pass."""
        return 3 * self.forward_flops(size)


def shared_prompt(prompt: int, completions: Sequence[int]) -> Work:
    """Count the work on a prompt of this length and its completions, whose tokens are all scored.

    By hand: a prompt of 2 with completions of 1 and 2 has 5 tokens, 3 of them scored, and
    3 + (2 + 1) + (4 + 3) = 13 pairs.
    """
    seen = prompt * (prompt + 1) // 2
    seen += sum(length * prompt + length * (length + 1) // 2 for length in completions)
    return Work(prompt + sum(completions), sum(completions), seen)


def total(parts: Sequence[Work]) -> Work:
    """Add up pieces of work."""
    return sum(parts, Work(0, 0, 0))
