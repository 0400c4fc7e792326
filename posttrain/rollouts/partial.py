"""Answers drawn in parts: so many tokens in a rollout, the rest in the next ones, by their policies
(Kimi k1.5, arXiv 2501.12599, partial rollouts).

A part of an answer is drawn as the answer to prompt + what is there already, with the random
numbers that the whole answer would have had: while the weights stand still, answers do not depend
on where they were cut. Each token keeps its log-prob and the number of the rollout that drew it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from posttrain.errors import ConfigError
from posttrain.packed.batch import split_by_tokens
from posttrain.rewards.repetition import ends_in_loop
from posttrain.rollouts.sampling import Completion, Sampling, Stretch

PREFILL_TOKENS = 1 << 18  # beginnings that are computed together: bounds the activations' memory
Generate = Callable[..., list[list[Completion]]]  # a Generator's method


@dataclass(frozen=True)
class Parts:
    """How answers are drawn part by part, and which parts train.

    tokens_per_rollout: an answer gets at most so many in one rollout; None: no limit, ordinary
    rollouts. max_staleness: tokens drawn up to so many rollouts ago train; 0: the newest policy's
    alone. loop_tokens: an answer that has used up its tokens of a rollout and ends in a loop of so
    many (posttrain.rewards.repetition) ends there; 0: none does.
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
        """ConfigError for a sampling whose limits do not look across parts, and for settings that
        could never act on answers as short as its."""
        if self.max_staleness and self.num_parts(sampling.max_tokens) == 1:
            raise ConfigError(
                f"max_staleness {self.max_staleness}: expected tokens_per_rollout below the "
                f"longest answer ({sampling.max_tokens} tokens), found {self.tokens_per_rollout}. "
                "Answers that are drawn in one rollout have no older tokens."
            )
        if self.loop_tokens > sampling.max_tokens:
            raise ConfigError(
                f"loop_tokens: expected at most the longest answer ({sampling.max_tokens} tokens), "
                f"found {self.loop_tokens}. 0 looks for no loops."
            )
        if self.tokens_per_rollout is None:
            return
        if sampling.stop_strings:
            raise ConfigError(
                "partial rollouts: stop strings may straddle two parts, and are not looked for "
                "there. Use stop ids, or tokens_per_rollout=None."
            )
        if sampling.min_tokens > self.tokens_per_rollout:
            raise ConfigError(
                f"partial rollouts: expected tokens_per_rollout of at least min_tokens "
                f"({sampling.min_tokens}), found {self.tokens_per_rollout}."
            )

    def num_parts(self, max_tokens: int) -> int:
        """Rollouts that the longest answer takes."""
        return -(-max_tokens // (self.tokens_per_rollout or max_tokens))


@dataclass
class OpenGroup:
    """A prompt whose answers are being drawn; finished when all of them are.

    position: its place in the endless order of prompts, for all ranks. row: of the data. seed: of
    its answers.
    """

    position: int
    row: int
    seed: int
    prompt_ids: Sequence[int]
    completions: list[Completion] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return bool(self.completions) and not self.unfinished

    @property
    def unfinished(self) -> list[int]:
        """Places of the answers that go on."""
        return [i for i, a in enumerate(self.completions) if a.finish_reason == "unfinished"]

    def state_dict(self) -> dict[str, Any]:
        completions = [asdict(completion) for completion in self.completions]
        place = {"position": self.position, "row": self.row, "seed": self.seed}
        return {**place, "completions": completions}


def sample_parts(
    generate: Generate,
    groups: Sequence[OpenGroup],
    *,
    version: int,
    settings: Parts,
    sampling: Sampling,
    num_generations: int,
) -> None:
    """The next part of every unfinished answer: of new groups all at once behind one prompt, of the
    others each behind its own beginning.

    version: the number of this rollout, which the tokens are marked with.
    """
    drawing = _Drawing(generate, version, settings, sampling, num_generations)
    new = [group for group in groups if not group.completions]
    begun = [(group, place) for group in groups for place in group.unfinished]
    if new:
        drawing.start(new)
    sizes = [len(g.prompt_ids) + len(g.completions[place].token_ids) for g, place in begun]
    for rows in split_by_tokens(sizes, PREFILL_TOKENS) if begun else ():
        drawing.go_on([begun[row] for row in rows])


@dataclass(frozen=True)
class _Drawing:
    """Of one rollout; adds parts to answers, and decides which are finished."""

    generate: Generate
    version: int
    settings: Parts
    sampling: Sampling
    num_generations: int

    @property
    def limit(self) -> int:
        """Tokens of a part."""
        most = self.sampling.max_tokens
        return min(self.settings.tokens_per_rollout or most, most)

    def start(self, groups: Sequence[OpenGroup]) -> None:
        drawn = self.generate(
            [group.prompt_ids for group in groups], replace(self.sampling, max_tokens=self.limit),
            self.num_generations, seeds=[self._numbers(group) for group in groups],
        )  # fmt: skip
        for group, parts in zip(groups, drawn, strict=True):
            group.completions = [self._joined(Completion(), part) for part in parts]

    def go_on(self, begun: Sequence[tuple[OpenGroup, int]]) -> None:
        """With the answers at these places of the groups."""
        answers = [group.completions[place] for group, place in begun]
        room = self.sampling.max_tokens - min(len(answer.token_ids) for answer in answers)
        drawn = self.generate(
            [[*g.prompt_ids, *a.token_ids] for (g, _), a in zip(begun, answers, strict=True)],
            replace(self.sampling, max_tokens=min(self.limit, room), min_tokens=0), 1,
            seeds=[self._numbers(group, place) for group, place in begun],
        )  # fmt: skip
        for (group, place), answer, (part,) in zip(begun, answers, drawn, strict=True):
            group.completions[place] = self._joined(answer, part)

    def _numbers(self, group: OpenGroup, place: int | None = None) -> Stretch:
        start = 0 if place is None else len(group.completions[place].token_ids)
        size = (self.num_generations, self.sampling.max_tokens)
        return Stretch(group.seed, *size, start=start, answer=place)

    def _joined(self, answer: Completion, part: Completion) -> Completion:
        room = self.sampling.max_tokens - len(answer.token_ids)  # the longest answers have less
        ids = answer.token_ids + part.token_ids[:room]
        stopped = part.finish_reason == "stop" and len(part.token_ids) <= room
        return Completion(
            ids,
            answer.logps + part.logps[:room],
            answer.sampler_logps + part.sampler_logps[:room],
            "stop" if stopped else self._reason(ids),
            answer.policy_versions + [self.version] * (len(ids) - len(answer.token_ids)),
        )

    def _reason(self, ids: list[int]) -> str:
        loop_tokens = self.settings.loop_tokens
        if loop_tokens and ends_in_loop(ids, num_tokens=loop_tokens):
            return "repetition"
        return "unfinished" if len(ids) < self.sampling.max_tokens else "length"
