"""Sample completions in parts, a limited number of tokens in each rollout, as in the partial
rollouts of Kimi k1.5 (arXiv 2501.12599).

    sample_parts(generator.generate, open_groups, version=3, settings=Parts(4096), …)

A part is sampled as the completion of the prompt and the tokens that are there already, with the
random numbers that the whole completion would have had: while the weights stand still, completions
do not depend on where they were cut. Each token keeps its log-prob and the number of the rollout
that sampled it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from posttrain.errors import ConfigError
from posttrain.packed.batch import split_by_tokens
from posttrain.rewards.repetition import ends_in_loop
from posttrain.rollouts.sampling import Completion, Sampling, Stretch

PREFILL_TOKENS = 1 << 18  # of beginnings in one call; bounds the memory of activations

Generate = Callable[..., list[list[Completion]]]  # a Generator's method


@dataclass(frozen=True)
class Parts:
    """The settings that cut completions into parts, and decide which parts train.

    Attributes:
        tokens_per_rollout: The most tokens that a completion gets in one rollout, at least 1; None
            sets no limit and gives ordinary rollouts.
        max_staleness: Tokens that were sampled at most this many rollouts ago train; 0 trains only
            those of the newest policy.
        loop_tokens: A completion that has used up its tokens of a rollout and ends in a loop of at
            least this many (posttrain.rewards.repetition) is ended there; 0 looks for no loops.
    """

    tokens_per_rollout: int | None = None
    max_staleness: int = 0
    loop_tokens: int = 0

    def __post_init__(self) -> None:
        expected = {
            "tokens_per_rollout >= 1, or None": self.tokens_per_rollout is None
            or self.tokens_per_rollout >= 1,
            "max_staleness >= 0": self.max_staleness >= 0,
            "loop_tokens of 0, or 3 and more": self.loop_tokens == 0 or self.loop_tokens >= 3,
        }
        wrong = [what for what, holds in expected.items() if not holds]
        if wrong:
            raise ConfigError(f"partial rollouts: expected {' and '.join(wrong)}; found {self}.")

    def check(self, sampling: Sampling) -> None:
        """Raise ConfigError for limits that do not work across parts, and for settings that could
        never act on completions as short as these."""
        if self.max_staleness and self.num_parts(sampling.max_tokens) == 1:
            raise ConfigError(
                f"max_staleness {self.max_staleness}: expected tokens_per_rollout below the "
                f"longest completion ({sampling.max_tokens} tokens), found "
                f"{self.tokens_per_rollout}. Completions of a single part have no older tokens."
            )
        if self.loop_tokens > sampling.max_tokens:
            raise ConfigError(
                f"loop_tokens: expected at most the longest completion ({sampling.max_tokens} "
                f"tokens), found {self.loop_tokens}. 0 looks for no loops."
            )
        if self.tokens_per_rollout is None:
            return
        if sampling.stop_strings:
            raise ConfigError(
                "partial rollouts: expected no stop strings, which are missed where they "
                "straddle two parts. Use stop ids, or tokens_per_rollout=None."
            )
        if sampling.min_tokens > self.tokens_per_rollout:
            raise ConfigError(
                f"partial rollouts: expected tokens_per_rollout of at least min_tokens "
                f"({sampling.min_tokens}), found {self.tokens_per_rollout}."
            )

    def num_parts(self, max_tokens: int) -> int:
        """Return the number of rollouts that the longest completion takes."""
        return -(-max_tokens // (self.tokens_per_rollout or max_tokens))


@dataclass
class OpenGroup:
    """A prompt whose completions are being sampled; it is finished when all of them are.

    Attributes:
        position: The prompt's position in the endless order of prompts, counted over all ranks.
        row: The prompt's row in the data.
        seed: The seed of its completions.
    """

    position: int
    row: int
    seed: int
    prompt_ids: Sequence[int]
    completions: list[Completion] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """True once sampling has begun and no completion is unfinished."""
        return bool(self.completions) and not self.unfinished

    @property
    def unfinished(self) -> list[int]:
        """Indices of the completions that need another part."""
        return [i for i, c in enumerate(self.completions) if c.finish_reason == "unfinished"]

    def state_dict(self) -> dict[str, Any]:
        """Return the group as JSON types; the prompt's tokens are read from the data again."""
        return {
            "position": self.position,
            "row": self.row,
            "seed": self.seed,
            "completions": [asdict(completion) for completion in self.completions],
        }


def sample_parts(
    generate: Generate,
    groups: Sequence[OpenGroup],
    *,
    version: int,
    settings: Parts,
    sampling: Sampling,
    num_generations: int,
) -> None:
    """Sample the next part of every unfinished completion, into the groups.

    The completions of new groups share one prefill of their prompt; the others are each prefilled
    with the prompt and their own beginning.

    Args:
        version: The number of this rollout, which the new tokens are marked with.
    """
    sampler = _PartSampler(generate, version, settings, sampling, num_generations)
    new = [group for group in groups if not group.completions]
    begun = [(group, index) for group in groups for index in group.unfinished]
    if new:
        sampler.start(new)
    sizes = [len(g.prompt_ids) + len(g.completions[index].token_ids) for g, index in begun]
    for rows in split_by_tokens(sizes, PREFILL_TOKENS) if begun else ():
        sampler.go_on([begun[row] for row in rows])


@dataclass(frozen=True)
class _PartSampler:
    """Adds the parts of one rollout to completions, and decides which are finished."""

    generate: Generate
    version: int
    settings: Parts
    sampling: Sampling
    num_generations: int

    @property
    def limit(self) -> int:
        """The most tokens of a part."""
        most = self.sampling.max_tokens
        return min(self.settings.tokens_per_rollout or most, most)

    def start(self, groups: Sequence[OpenGroup]) -> None:
        """Sample the first part of all completions of these groups."""
        sampled = self.generate(
            [group.prompt_ids for group in groups],
            replace(self.sampling, max_tokens=self.limit),
            self.num_generations,
            seeds=[self._numbers(group) for group in groups],
        )
        for group, parts in zip(groups, sampled, strict=True):
            group.completions = [self._joined(Completion(), part) for part in parts]

    def go_on(self, begun: Sequence[tuple[OpenGroup, int]]) -> None:
        """Continue the unfinished completions at these (group, index) positions."""
        completions = [group.completions[index] for group, index in begun]
        # One limit for the whole call: the room of the shortest. `_joined` cuts the longer ones.
        room = self.sampling.max_tokens - min(len(c.token_ids) for c in completions)
        sampled = self.generate(
            [[*g.prompt_ids, *c.token_ids] for (g, _), c in zip(begun, completions, strict=True)],
            replace(self.sampling, max_tokens=min(self.limit, room), min_tokens=0),
            1,
            seeds=[self._numbers(group, index) for group, index in begun],
        )
        for (group, index), completion, (part,) in zip(begun, completions, sampled, strict=True):
            group.completions[index] = self._joined(completion, part)

    def _numbers(self, group: OpenGroup, index: int | None = None) -> Stretch:
        """The part's share of the random numbers that the whole completion, or group, has."""
        start = 0 if index is None else len(group.completions[index].token_ids)
        size = (self.num_generations, self.sampling.max_tokens)
        return Stretch(group.seed, *size, start=start, answer=index)

    def _joined(self, completion: Completion, part: Completion) -> Completion:
        room = self.sampling.max_tokens - len(completion.token_ids)
        ids = completion.token_ids + part.token_ids[:room]
        stopped = part.finish_reason == "stop" and len(part.token_ids) <= room
        return Completion(
            ids,
            completion.logps + part.logps[:room],
            completion.sampler_logps + part.sampler_logps[:room],
            "stop" if stopped else self._reason(ids),
            completion.policy_versions + [self.version] * (len(ids) - len(completion.token_ids)),
        )

    def _reason(self, ids: list[int]) -> str:
        loop_tokens = self.settings.loop_tokens
        if loop_tokens and ends_in_loop(ids, num_tokens=loop_tokens):
            return "repetition"
        return "unfinished" if len(ids) < self.sampling.max_tokens else "length"
