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
    stop_strings: an answer ends with the token that completes one of them. min_tokens: no stop
    token is drawn before so many others. top_k: only the k most likely tokens are drawn; 0: all.
    top_p: only the fewest most likely tokens whose probabilities add up to p; 1: all.
    """

    max_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    stop_strings: tuple[str, ...] = ()
    min_tokens: int = 0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        expected = {
            "temperature >= 0": self.temperature >= 0,
            "max_tokens >= 1": self.max_tokens >= 1,
            "0 <= min_tokens <= max_tokens": 0 <= self.min_tokens <= self.max_tokens,
            "top_k >= 0": self.top_k >= 0,
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "no empty stop string": all(self.stop_strings),
        }
        wrong = [what for what, holds in expected.items() if not holds]
        if wrong:
            raise ConfigError(f"sampling: expected {' and '.join(wrong)}; found {self}.")

    @property
    def is_restricted(self) -> bool:
        """Tokens are drawn from another distribution than the policy's at this temperature."""
        return bool(self.top_k or self.top_p < 1 or self.min_tokens)


@dataclass
class Completion:
    """One answer, as sampled; it is never decoded and tokenised again.

    token_ids: with the stop token, if one was drawn. logps: the policy's log-prob of each token in
    nats at the sampling temperature (at temperature 1 for greedy decoding). sampler_logps: that in
    the distribution it was drawn from, after top-k, top-p and min_tokens; the same where there are
    none. finish_reason: `stop` (a stop token or string) or `length` (cut off); of an answer that is
    drawn in parts also `repetition` (cut off in a loop) or `unfinished`. policy_versions: the
    rollout that each token was drawn in, where they are not all of the newest.
    """

    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    sampler_logps: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "repetition", "unfinished"] = "length"
    policy_versions: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Stretch:
    """Stands in for a prompt's seed where a part of its answers is drawn: the numbers are those
    that the whole answers would have had.

    seed: the prompt's. answers, tokens: of whole answers. start: tokens that are there already.
    answer: the one that goes on; None: all of them.
    """

    seed: int
    answers: int
    tokens: int
    start: int = 0
    answer: int | None = None


class Generator(Protocol):
    """Anything that answers prompts: our own decode loop, or an inference engine."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int,
        *,
        seeds: Sequence[int | Stretch],
    ) -> list[list[Completion]]:
        """`num_generations` answers to each prompt; prompt i draws from seeds[i] alone."""
        ...


def uniforms(seeds: Sequence[int | Stretch], num_generations: int, max_tokens: int) -> Tensor:
    """(prompts * answers, max_tokens) numbers in [0, 1), each prompt's from its own seed.

    So an answer does not depend on the batch, the rank or the order in which it was drawn, and
    two ranks draw the same only if they are given the same seed.
    """
    return torch.cat([_table(seed, num_generations, max_tokens) for seed in seeds])


def _table(seed: int | Stretch, answers: int, tokens: int) -> Tensor:
    """(answers, tokens); of a Stretch that ends earlier, 0 from there on."""
    if not isinstance(seed, Stretch):
        return torch.rand(answers, tokens, generator=torch.Generator().manual_seed(seed))
    whole = _table(seed.seed, seed.answers, seed.tokens)
    rows = whole if seed.answer is None else whole[seed.answer : seed.answer + 1]
    part = rows[:, seed.start : seed.start + tokens]
    return torch.nn.functional.pad(part, (0, tokens - part.shape[1]))


def restrict(log_probs: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """(R, V) log-probs with all but the most likely tokens at -inf, normalised again.

    First the `top_k` most likely stay (0: all), then of these, in falling order, each before which
    the others add up to less than `top_p` of them: the token that crosses p stays, so one always
    does. Among equal probabilities which one stays is not defined.
    By hand: probabilities 0.5, 0.3, 0.2 and p = 0.6 give 0.625, 0.375, 0.
    Source: Fan et al. (1805.04833); Holtzman et al. (1904.09751) section 3.1.
    """
    if not top_k and top_p >= 1:
        return log_probs
    num_kept = min(top_k, log_probs.shape[-1]) if top_k else log_probs.shape[-1]
    kept, tokens = log_probs.topk(num_kept, dim=-1)  # in falling order
    kept = kept.log_softmax(-1)
    before = kept.exp().cumsum(-1) - kept.exp()
    kept = kept.masked_fill(before >= top_p, -torch.inf).log_softmax(-1)
    return torch.full_like(log_probs, -torch.inf).scatter(-1, tokens, kept)


def draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """(R, V) log-probs, (R,) numbers in [0, 1) -> (R,) tokens, by inverting the distribution."""
    cumulative = log_probs.exp().cumsum(-1)
    # Scaled, for the sum is 1 only up to rounding. A float32 below 1 is at most 1 - 2^-24, so the
    # level is below the sum, and `right` passes over tokens of probability 0 at either end.
    level = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1)
