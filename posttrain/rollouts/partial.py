"""Answers drawn in parts: so many tokens in a rollout, the rest in the next ones, by their policies
(Kimi k1.5, arXiv 2501.12599, partial rollouts).

A part of an answer is drawn as the answer to prompt + what is there already, with the random
numbers that the whole answer would have had: while the weights stand still, answers do not depend
on where they were cut. Each token keeps its log-prob and the number of the rollout that drew it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.repetition import ends_in_loop
from posttrain.rollouts.sampling import Completion, Sampling, Stretch

Generate = Callable[..., list[list[Completion]]]  # a Generator's method


@dataclass(frozen=True)
class PartialRollouts:
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
        """ConfigError for a sampling whose limits do not look across parts."""
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
    answers: list[Completion] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return bool(self.answers) and not self.unfinished

    @property
    def unfinished(self) -> list[int]:
        """Places of the answers that go on."""
        return [i for i, a in enumerate(self.answers) if a.finish_reason == "unfinished"]

    def state_dict(self) -> dict[str, Any]:
        answers = [asdict(answer) for answer in self.answers]
        return {"position": self.position, "row": self.row, "seed": self.seed, "answers": answers}


def draw_parts(
    generate: Generate,
    groups: Sequence[OpenGroup],
    *,
    version: int,
    settings: PartialRollouts,
    sampling: Sampling,
    answers_per_prompt: int,
) -> None:
    """The next part of every unfinished answer: of new groups all at once behind one prompt, of the
    others each behind its own beginning.

    version: the number of this rollout, which the tokens are marked with.
    """
    limit = min(settings.tokens_per_rollout or sampling.max_tokens, sampling.max_tokens)
    numbers = partial(Stretch, answers=answers_per_prompt, tokens=sampling.max_tokens)
    join = _Joining(version, settings.loop_tokens, sampling.max_tokens)
    new = [group for group in groups if not group.answers]
    begun = [(group, i, group.answers[i]) for group in groups for i in group.unfinished]
    if new:
        drawn = generate(
            [group.prompt_ids for group in new], replace(sampling, max_tokens=limit),
            answers_per_prompt, seeds=[numbers(group.seed) for group in new],
        )  # fmt: skip
        for group, siblings in zip(new, drawn, strict=True):
            group.answers = [join(Completion(), part) for part in siblings]
    if begun:
        lengths = [len(answer.token_ids) for *_, answer in begun]
        limit = min(limit, sampling.max_tokens - min(lengths))  # longer answers are cut to fit
        drawn = generate(
            [[*group.prompt_ids, *answer.token_ids] for group, _, answer in begun],
            replace(sampling, max_tokens=limit, min_tokens=0), 1,
            seeds=[
                numbers(group.seed, start=length, answer=i)
                for (group, i, _), length in zip(begun, lengths, strict=True)
            ],
        )  # fmt: skip
        for (group, i, answer), (part,) in zip(begun, drawn, strict=True):
            group.answers[i] = join(answer, part)


@dataclass(frozen=True)
class _Joining:
    """Adds a part to an answer, and decides whether the answer is finished."""

    version: int
    loop_tokens: int
    max_tokens: int

    def __call__(self, answer: Completion, part: Completion) -> Completion:
        room = self.max_tokens - len(answer.token_ids)
        ids = answer.token_ids + part.token_ids[:room]
        stopped = part.finish_reason == "stop" and len(part.token_ids) <= room
        return Completion(
            ids,
            answer.logps + part.logps[:room],
            answer.drawn_logps + part.drawn_logps[:room],
            "stop" if stopped else self._reason(ids),
            answer.policy_versions + [self.version] * (len(ids) - len(answer.token_ids)),
        )

    def _reason(self, ids: list[int]) -> str:
        if self.loop_tokens and ends_in_loop(ids, num_tokens=self.loop_tokens):
            return "repetition"
        return "unfinished" if len(ids) < self.max_tokens else "length"
