"""Calling all rewards of a run, in parallel, and adding up their weighted parts.

    rewards = {"correct": (math_reward, 1.0), "format": (think_answer_format, 0.1)}
    check_rewards(rewards, dataset.column_names)     # a misspelt column is an error before step 0
    scores = score(rewards, completions, prompts=…, completion_ids=…, columns={"answer": […]})
    torch.tensor(scores.totals).view(P, G)           # NaN for a completion without a score

A reward that raises or hangs never ends a run: its completions count as None, and the call is
counted and reported once. One that returns a wrong number of values, or values that are not
numbers, has a bug that no later step will fix, so that is an error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from posttrain.rewards.checks import check_rewards
from posttrain.rewards.pieces import (
    DEFAULT_TIMEOUT_SECONDS,
    RUN_KEYWORDS,
    Arguments,
    Call,
    Result,
    Reward,
    Values,
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
    """Settings for calling rewards and adding up their parts.

    Attributes:
        gates: Part to part: `{"short": "correct"}` counts "short", bonus or penalty, only for
            completions whose "correct" is above 0. The part itself is logged as it was scored.
        timeout_seconds: Deadline for each piece of a reward's call: see `pieces`. A reward that
            waits for others, as a judge does, has an attribute of this name instead.
        num_workers: Number of processes that rewards run in. None: one per core, up to four. 0:
            threads of this process.
    """

    gates: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    num_workers: int | None = None


@dataclass(frozen=True)
class Scores:
    """The scores of N completions, in the order in which they were given.

    Attributes:
        totals: N weighted sums of the parts; NaN if a part with weight is None.
        parts: For each reward N unweighted values; None for a completion that it could not score.
        errors: Number of calls of rewards that raised.
        timeouts: Number of calls of rewards that passed their deadline.
        none: Number of completions without a total.
        failures: For each reward that failed, the first failure in one line.
        rules: For each reward N rules that decided, None where it told none (`note_rules`).
    """

    totals: list[float]
    parts: dict[str, list[float | None]]
    errors: int
    timeouts: int
    none: int
    failures: dict[str, str]
    rules: dict[str, Sequence[str | None]] = field(default_factory=dict)

    def sums(self) -> dict[str, tuple[float, int]]:
        """Return for each part the sum and number of its scores, which add up over ranks."""
        scored = {name: [v for v in part if v is not None] for name, part in self.parts.items()}
        return {name: (math.fsum(values), len(values)) for name, values in scored.items()}

    def means(self) -> dict[str, float]:
        """Return for each part the mean of its scores; NaN if there are none."""
        return {name: total / n if n else math.nan for name, (total, n) in self.sums().items()}

    def causes(self) -> list[str]:
        """Say, for each reward that left a completion without a score, why it first did."""
        return [
            f"reward {name!r}: {self.failures.get(name, 'it gave None, NaN or an infinite number')}"
            for name, values in self.parts.items()
            if None in values
        ]

    @staticmethod
    def joined(scores: Sequence[Scores]) -> Scores:
        """Join the scores of several calls with the same rewards."""
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
            rules={
                name: [rule for one in scores for rule in one.rules[name]]
                for name in scores[0].rules
            },
        )


def score(
    rewards: Rewards,
    completions: Sequence[Completion],
    *,
    prompts: Sequence[object],
    completion_ids: Sequence[Sequence[int]],
    columns: Arguments,
    scoring: Scoring | None = None,
) -> Scores:
    """Call `start_scoring` and wait for the scores."""
    given = {"prompts": prompts, "completion_ids": completion_ids, "columns": columns}
    return start_scoring(rewards, completions, **given, scoring=scoring)()


def start_scoring(
    rewards: Rewards,
    completions: Sequence[Completion],
    *,
    prompts: Sequence[object],
    completion_ids: Sequence[Sequence[int]],
    columns: Arguments,
    scoring: Scoring | None = None,
) -> Callable[[], Scores]:
    """Begin to call every reward, by keyword. The function that is returned waits for the scores.

    A completion's total is the sum of weight times part. A part that is None (or NaN, or infinite)
    leaves the completion without a total, unless its weight is 0, because its group would compare
    half a sum with whole ones. (TRL sums the parts that there are.)

    Args:
        rewards: Name to (reward, weight), checked before with `check_rewards`. A reward without
            `**kwargs` gets only the arguments that it names. A coroutine function is awaited.
        completions: N texts, or N lists of chat messages.
        prompts: N prompts. The equal prompts of a group are neighbours.
        completion_ids: N lists of token ids.
        columns: The data's other columns, N values each. `trainer_state`, `log_extra` and
            `log_metric`, if among them, are passed on as they are.
        scoring: How to call and add up; by default `Scoring()`.

    Raises:
        ConfigError: (when waiting) A reward returned a wrong number of values, or not numbers.
        ValueError: The arguments differ in length.
    """
    call = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    arguments = {**columns, **call}
    num_completions = len(completions)
    for name, values in arguments.items():
        if name not in RUN_KEYWORDS and len(values) != num_completions:
            raise ValueError(f"expected {num_completions} values in {name!r}, found {len(values)}.")
    how = scoring or Scoring()
    num_workers = default_workers() if how.num_workers is None else how.num_workers
    waiting = {
        name: start_call(
            Call(
                *(name, reward, arguments, num_completions),
                timeout_seconds=getattr(reward, "timeout_seconds", how.timeout_seconds),
                num_workers=num_workers,
            )
        )
        for name, (reward, _) in rewards.items()
    }
    return lambda: _scores(rewards, {n: wait() for n, wait in waiting.items()}, how.gates)


class WithMessages:
    """A reward made by `with_messages`."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.__wrapped__ = reward  # lends its signature

    def __call__(self, *, completions: Sequence[Completion], **arguments: object) -> Values:
        texts = map(completion_text, completions)
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        return self.reward(completions=chats, **arguments)


def with_messages(reward: Reward) -> WithMessages:
    """Adapt a reward that reads chat messages, as TRL's do, to completions that are plain text.

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
        rules={n: r.rules or [None] * len(totals) for n, r in results.items()},
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


def _report_once(name: str, failure: Failure, num_completions: int) -> None:
    if (name, failure.kind) in _reported:
        return
    _reported.add((name, failure.kind))
    _logger.warning(
        "reward %r failed: %s. %d completions of this call cannot be scored and are left out. "
        "The run continues; further failures of this kind are only counted.",
        name,
        failure.what,
        num_completions,
    )
