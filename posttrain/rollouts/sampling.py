"""What is asked of a generator, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from posttrain.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    temperature: logits are divided by it; 0 takes the most likely token. max_tokens: tokens of an
    answer, end-of-sequence included. stop_ids: tokens that end an answer and belong to it.
    """

    max_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_tokens < 1:
            raise ConfigError(
                "sampling: expected temperature >= 0 and max_tokens >= 1; "
                f"found temperature {self.temperature}, max_tokens {self.max_tokens}."
            )


@dataclass
class Completion:
    """One answer, as sampled; it is never decoded and tokenised again.

    token_ids: with the stop token, if one was drawn. logps: log-prob of each token in nats at
    the sampling temperature (at temperature 1 for greedy decoding). finish_reason: `stop` (a stop
    token was drawn) or `length` (cut off).
    """

    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"


class Generator(Protocol):
    """Anything that answers prompts: our own decode loop, or an inference engine."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        answers_per_prompt: int,
        *,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """`answers_per_prompt` answers to each prompt; prompt i draws from seeds[i] alone."""
        ...


def uniforms(seeds: Sequence[int], answers_per_prompt: int, max_tokens: int) -> Tensor:
    """(prompts * answers, max_tokens) numbers in [0, 1), each prompt's from its own seed.

    So an answer does not depend on the batch, the rank or the order in which it was drawn, and
    two ranks draw the same only if they are given the same seed.
    """
    drawn = [
        torch.rand(answers_per_prompt, max_tokens, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.cat(drawn)


def draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """(R, V) log-probs, (R,) numbers in [0, 1) -> (R,) tokens, by inverting the distribution."""
    cumulative = log_probs.exp().cumsum(-1)
    # Scaled, for the sum is 1 only up to rounding. A float32 below 1 is at most 1 - 2^-24, so the
    # level is below the sum, and `right` passes over tokens of probability 0 at either end.
    level = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1)
