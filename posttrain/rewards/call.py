"""Calling rewards: weighed, gated, in parallel, and survived.

    rewards = {"correct": (math_reward, 1.0), "format": (think_answer_format, 0.1)}
    check_rewards(rewards, dataset.column_names)     # a misspelt column ends here, before step 0
    scores = score(rewards, completions, prompts=…, completion_ids=…, columns={"answer": […]})
    torch.tensor(scores.totals).view(P, G)           # NaN where an answer could not be scored

A reward that raises or hangs never ends a run: its answers count as None, the call is counted and
reported once. One that returns the wrong number of values, or something else than numbers, has a
bug that no step will mend: that is an error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.rewards.checks import check_rewards
from posttrain.rewards.pieces import (
    DEFAULT_TIMEOUT_SECONDS,
    RUN_KEYWORDS,
    Call,
    Result,
    Reward,
    default_workers,
    start_call,
)
from posttrain.rewards.text import Completion, completion_text
from posttrain.workers.deadline import Failure

__all__ = ["Scores", "Scoring", "check_rewards", "score", "start_scoring", "with_messages"]

Rewards = Mapping[str, tuple[Reward, float]]

_logger = logging.getLogger(__name__)
_reported: set[tuple[str, str]] = set()  # (reward, kind of failure)


@dataclass(frozen=True)
class Scoring:
    """How rewards are called and added up.

    Attributes:
        gates: Part to part: `{"short": "correct"}` counts "short", bonus or penalty, only in
            answers whose "correct" is above 0. The part itself is kept as it was scored.
        timeout_seconds: For each piece of a reward's call, see `calls`.
        num_workers: Processes that rewards run in; None: one for each core, up to four; 0: threads
            of this process.
    """

    gates: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    num_workers: int | None = None


@dataclass(frozen=True)
class Scores:
    """What one call of `score` found, for N answers in the order they were given.

    Attributes:
        totals: N weighted sums of the parts; NaN where a part that counts is None.
        parts: For each reward N values, unweighted; None where it could not score.
        errors: Calls of rewards that raised.
        timeouts: Calls of rewards that passed their deadline.
        none: Answers without a total.
        failures: For each reward that failed, what happened first, in one line.
    """

    totals: list[float]
    parts: dict[str, list[float | None]]
    errors: int
    timeouts: int
    none: int
    failures: dict[str, str]

    def sums(self) -> dict[str, tuple[float, int]]:
        """For each part the sum over its scored answers and their number, to add up over ranks."""
        scored = {name: [v for v in part if v is not None] for name, part in self.parts.items()}
        return {name: (math.fsum(values), len(values)) for name, values in scored.items()}

    def means(self) -> dict[str, float]:
        """For each part the mean over its scored answers; NaN where there is none."""
        return {name: total / n if n else math.nan for name, (total, n) in self.sums().items()}

    @staticmethod
    def joined(scores: Sequence[Scores]) -> Scores:
        """Of several calls with the same rewards, one after the other."""
        return Scores(
            totals=[total for one in scores for total in one.totals],
            parts={
                name: [value for one in scores for value in one.parts[name]]
                for name in scores[0].parts
            },
            errors=sum(one.errors for one in scores),
            timeouts=sum(one.timeouts for one in scores),
            none=sum(one.none for one in scores),
            failures={n: what for one in reversed(scores) for n, what in one.failures.items()},
        )


def score(
    rewards: Rewards,
    completions: Sequence[Completion],
    *,
    prompts: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Any],
    scoring: Scoring | None = None,
) -> Scores:
    """`start_scoring`, and wait for it."""
    wait = start_scoring(
        rewards, completions, prompts=prompts, completion_ids=completion_ids, columns=columns,
        scoring=scoring,
    )  # fmt: skip
    return wait()


def start_scoring(
    rewards: Rewards,
    completions: Sequence[Completion],
    *,
    prompts: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Any],
    scoring: Scoring | None = None,
) -> Callable[[], Scores]:
    """Have every reward called, by keyword; the function that is returned waits for the scores.

    An answer's total is the sum of weight times part. A part that is None (or NaN, or infinite)
    leaves the answer without a total, unless its weight is 0: half a sum would be compared with
    whole ones in its group. (TRL instead sums what there is.)

    Args:
        rewards: Name to (reward, weight), checked before with `check_rewards`. A reward without
            `**kwargs` gets only the arguments it names; a coroutine function is awaited.
        completions: N texts, or N lists of chat messages.
        prompts: N prompts; those of one group, equal ones, stand together.
        completion_ids: N lists of token ids.
        columns: The data's other columns, N values each. `trainer_state`, `log_extra` and
            `log_metric`, if among them, are handed on as they are.
        scoring: How; by default as `Scoring()`.

    Raises:
        ConfigError: (when waiting) A reward returned another number of values, or not numbers.
        ValueError: Arguments of different lengths.
    """
    call = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    arguments = {**columns, **call}
    num_answers = len(completions)
    for name, values in arguments.items():
        if name not in RUN_KEYWORDS and len(values) != num_answers:
            raise ValueError(f"expected {num_answers} values in {name!r}, found {len(values)}.")
    how = scoring or Scoring()
    num_workers = default_workers() if how.num_workers is None else how.num_workers
    limits = {"timeout_seconds": how.timeout_seconds, "num_workers": num_workers}
    waiting = {
        name: start_call(Call(name, reward, arguments, num_answers, **limits))
        for name, (reward, _) in rewards.items()
    }
    return lambda: _scores(rewards, {n: wait() for n, wait in waiting.items()}, how.gates)


class WithMessages:
    """What `with_messages` makes."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.__wrapped__ = reward  # its signature is ours

    def __call__(self, *, completions: Sequence[Completion], **arguments: Any) -> Any:
        texts = map(completion_text, completions)
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        return self.reward(completions=chats, **arguments)


def with_messages(reward: Reward) -> WithMessages:
    """A reward that reads chat messages, as TRL's own do, for answers that are plain text.

    It gets each completion as `[{"role": "assistant", "content": text}]`.
    """
    return WithMessages(reward)


def _scores(rewards: Rewards, results: dict[str, Result], gates: Mapping[str, str]) -> Scores:
    parts = {name: result.values for name, result in results.items()}
    totals = _weighted_totals(parts, {n: w for n, (_, w) in rewards.items() if w}, gates)
    failures = {name: result.failures for name, result in results.items() if result.failures}
    for name, found in failures.items():
        _report_once(name, found[0], parts[name].count(None))
    everything = [failure for found in failures.values() for failure in found]
    timeouts = sum(failure.is_timeout for failure in everything)
    return Scores(
        totals=totals,
        parts=parts,
        errors=len(everything) - timeouts,
        timeouts=timeouts,
        none=sum(map(math.isnan, totals)),
        failures={name: found[0].what for name, found in failures.items()},
    )


def _weighted_totals(
    parts: dict[str, list[float | None]], weights: dict[str, float], gates: Mapping[str, str]
) -> list[float]:
    totals = []
    for row in range(len(next(iter(parts.values())))):
        values = {name: part[row] for name, part in parts.items()}
        terms = [_term(values, name, gates.get(name)) for name in weights]
        is_scored = all(term is not None for term in terms)
        weighted = (weight * term for weight, term in zip(weights.values(), terms, strict=True))
        totals.append(math.fsum(weighted) if is_scored else math.nan)
    return totals


def _term(values: dict[str, float | None], name: str, gate: str | None) -> float | None:
    if gate is None:
        return values[name]
    passed = values[gate]
    if passed is None:
        return None
    return values[name] if passed > 0 else 0.0


def _report_once(name: str, failure: Failure, num_answers: int) -> None:
    if (name, failure.kind) in _reported:
        return
    _reported.add((name, failure.kind))
    _logger.warning(
        "reward %r failed: %s. %d answers of this call cannot be scored and are left out. "
        "The run goes on; later failures of this kind are only counted.",
        name,
        failure.what,
        num_answers,
    )
