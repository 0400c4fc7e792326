"""The request to a generator and its result, and how a token is sampled.

    sampling = Sampling(max_tokens=512, stop_ids=(tokenizer.eos_token_id,), temperature=0.8)
    completions = generator.generate(prompts, sampling, num_generations=4, seeds=seeds)

Random numbers come from tables, one per prompt and from its seed, so that a completion does not
depend on the batch, the rank or the order in which it was generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """The settings that completions are sampled with.

    Args:
        max_tokens: most tokens of a completion, end-of-sequence included.
        stop_ids: tokens that end a completion and belong to it.
        temperature: logits are divided by it; 0 takes the most likely token.
        stop_strings: a completion ends with the token that completes one of them.
        min_tokens: tokens of a completion before which no stop token is sampled.
        top_k: sample from the k most likely tokens; 0 turns it off.
        top_p: sample from the fewest most likely tokens whose probabilities add up to p; 1 turns
            it off.
        vocabulary: tokens of the tokenizer. A model whose embedding has more rows, as padded ones
            do, never samples those; None takes all.
        never: tokens that are not sampled, such as those that stand for images.

    Raises:
        ConfigError: for a value outside its range.
    """

    max_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    stop_strings: tuple[str, ...] = ()
    min_tokens: int = 0
    top_k: int = 0
    top_p: float = 1.0
    vocabulary: int | None = None
    never: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        expected = {
            "temperature >= 0": self.temperature >= 0,
            "max_tokens >= 1": self.max_tokens >= 1,
            "0 <= min_tokens <= max_tokens": 0 <= self.min_tokens <= self.max_tokens,
            "top_k >= 0": self.top_k >= 0,
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "no empty stop string": all(self.stop_strings),
            "vocabulary >= 1": self.vocabulary is None or self.vocabulary >= 1,
        }
        wrong = [what for what, holds in expected.items() if not holds]
        if wrong:
            raise ConfigError(f"sampling: expected {' and '.join(wrong)}; found {self}.")

    @property
    def is_restricted(self) -> bool:
        """True if tokens come from another distribution than the policy's at this temperature."""
        return bool(self.top_k or self.top_p < 1 or self.min_tokens)

    def string_ends(
        self, rows: Sequence[tuple[Sequence[int], int]], tokenizer: PreTrainedTokenizerBase
    ) -> list[int]:
        """For each row the number of tokens with which it first completes a stop string; else 0.

        rows: the tokens of each, and how many of them have been searched.
        """
        sizes = [(row, start, len(ids)) for row, (ids, start) in enumerate(rows)]
        spans = [(row, end) for row, start, size in sizes for end in range(start + 1, size + 1)]
        # A token holds a byte at least.
        longest = max(len(string.encode()) for string in self.stop_strings)
        tails = [rows[row][0][max(0, end - longest) : end] for row, end in spans]
        ends = [0] * len(rows)
        for (row, end), tail in zip(spans, tokenizer.batch_decode(tails), strict=True):
            if not ends[row] and any(string in tail for string in self.stop_strings):
                ends[row] = end
        return ends


@dataclass
class Completion:
    """One completion, as sampled; it is never decoded and tokenised again.

    token_ids: with the stop token, if one was sampled. logps: log-prob of each token by the policy
    in nats, at the sampling temperature (at temperature 1 for greedy decoding). sampler_logps: the
    same in the distribution that was sampled from, after top-k, top-p and min_tokens.
    finish_reason: `stop` (a stop token or string) or `length` (cut off); for a completion that is
    generated in parts also `repetition` (cut off in a loop) or `unfinished`. policy_versions: the
    rollout that each token was sampled in, if they are not all of the newest. experts,
    prompt_experts: (tokens, C) choices of a mixture's routers, -1 for the last token, which no
    forward of the rollout had; None unless asked for (posttrain.packed.replay).
    """

    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    sampler_logps: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "repetition", "unfinished"] = "length"
    policy_versions: list[int] = field(default_factory=list)
    experts: Tensor | None = None
    prompt_experts: Tensor | None = None


@dataclass(frozen=True)
class Stretch:
    """Takes the place of a prompt's seed where only a part of its completions is generated.

    The random numbers are those that the whole completions would have had.

    seed: the prompt's. answers, tokens: completions and tokens of the whole table. start: tokens
    that are there already. answer: the completion that goes on; None: all of them.
    """

    seed: int
    answers: int
    tokens: int
    start: int = 0
    answer: int | None = None


class Generator(Protocol):
    """Anything that completes prompts: our own decode loop, or an inference engine."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int,
        *,
        seeds: Sequence[int | Stretch],
    ) -> list[list[Completion]]:
        """Generate `num_generations` completions of each prompt, those of prompt i by seeds[i]."""
        ...


def uniforms(seeds: Sequence[int | Stretch], num_generations: int, max_tokens: int) -> Tensor:
    """(prompts * num_generations, max_tokens) numbers in [0, 1), each prompt's from its own seed.

    Two ranks sample the same completions only if they are given the same seed.
    """
    return torch.cat([_table(seed, num_generations, max_tokens) for seed in seeds])


def _table(seed: int | Stretch, answers: int, tokens: int) -> Tensor:
    """(answers, tokens) numbers; 0 beyond the end of a Stretch that is shorter."""
    if not isinstance(seed, Stretch):
        return torch.rand(answers, tokens, generator=torch.Generator().manual_seed(seed))
    whole = _table(seed.seed, seed.answers, seed.tokens)
    rows = whole if seed.answer is None else whole[seed.answer : seed.answer + 1]
    part = rows[:, seed.start : seed.start + tokens]
    return torch.nn.functional.pad(part, (0, tokens - part.shape[1]))


def restrict(log_probs: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set all but the most likely tokens of (R, V) log-probs to -inf, and normalise again.

    First the `top_k` most likely tokens stay (0: all of them). Of these, in falling order, a token
    stays if those before it add up to less than `top_p` of their sum: the one that crosses p
    stays, so at least one does. Which of several equal probabilities stays is not defined.
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


def sample_tokens(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """(R, V) log-probs, (R,) numbers in [0, 1) -> (R,) tokens, by inverting the distribution.

    The token is the first one at which the cumulative sum of probabilities exceeds the number. By
    hand: probabilities 0.5, 0, 0.5 and the number 0.5 give token 2. A token of probability 0 is
    never returned.
    """
    probabilities = log_probs.exp()
    cumulative = probabilities.cumsum(-1)
    # Scaled, for the sum is 1 only up to rounding. A float32 below 1 is at most 1 - 2^-24, so the
    # level is below the last sum and the search ends inside the row.
    level = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, level, right=True)
    # CUDA adds up in parallel, and its cumulative sum may fall by a rounding error, or rise at a
    # token of probability 0 (pytorch #13867, #16075). The search still ends where it crosses the
    # level, but that token may be impossible, its log-prob -inf, and the loss NaN. Such a row gets
    # its most likely token: about one in 10^7, and none where the sum is monotone.
    impossible = probabilities.gather(-1, token) == 0
    return torch.where(impossible, probabilities.argmax(-1, keepdim=True), token).squeeze(-1)


def choose(
    logits: Tensor, uniform: Tensor, sampling: Sampling, stop_ids: Tensor, step: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Choose the next token of R rows: (R,) tokens, and (2, R) log-probs of policy and sampling.

    Args:
        logits: (R, V).
        uniform: (R,) numbers in [0, 1).
        step: tokens that the rows' completions have so far, or (R,) those of each.
    """
    log_probs, allowed = distributions(logits, sampling, stop_ids, step)
    token = sample_tokens(allowed, uniform) if sampling.temperature else allowed.argmax(-1)
    own = log_probs.gather(-1, token[:, None]).squeeze(-1)
    sampled = own if allowed is log_probs else allowed.gather(-1, token[:, None]).squeeze(-1)
    return token, torch.stack((own, sampled))


def distributions(
    logits: Tensor, sampling: Sampling, stop_ids: Tensor, step: int | Tensor
) -> tuple[Tensor, Tensor]:
    """(R, V) log-probs of the policy, and those sampled from: the same where nothing restricts."""
    log_probs = (logits.float() / (sampling.temperature or 1.0)).log_softmax(-1)
    allowed = log_probs
    if isinstance(step, Tensor) and sampling.min_tokens:
        unstopped = log_probs.index_fill(1, stop_ids, -torch.inf).log_softmax(-1)
        allowed = torch.where((step < sampling.min_tokens)[:, None], unstopped, log_probs)
    elif not isinstance(step, Tensor) and step < sampling.min_tokens:
        allowed = log_probs.index_fill(1, stop_ids, -torch.inf).log_softmax(-1)
    if (sampling.vocabulary or logits.shape[1]) < logits.shape[1]:
        outside = torch.arange(logits.shape[1], device=logits.device) >= sampling.vocabulary
        allowed = allowed.masked_fill(outside, -torch.inf).log_softmax(-1)
    if sampling.never:
        allowed = allowed.clone()
        allowed[:, list(sampling.never)] = -torch.inf
        allowed = allowed.log_softmax(-1)
    return log_probs, restrict(allowed, top_k=sampling.top_k, top_p=sampling.top_p)


def completions_of(
    tokens: Tensor, logps: Tensor, lengths: Tensor, stopped: Tensor
) -> list[Completion]:
    """Make completions from (R, T) tokens and (2, R, T) log-probs, read in two transfers.

    lengths: (R,) tokens of each row. stopped: (R,) whether it ended by itself.
    """
    integers = torch.cat((lengths[:, None], stopped[:, None].long(), tokens), 1).tolist()
    completions = []
    for (length, ended, *ids), own, sampled in zip(integers, *logps.tolist(), strict=True):
        reason = "stop" if ended else "length"
        completions.append(Completion(ids[:length], own[:length], sampled[:length], reason))
    return completions
