"""Calling rewards: checked against the data before training, weighed, and survived.

    rewards = {"correct": (math_reward, 1.0), "format": (think_answer_format, 0.1)}
    check_rewards(rewards, dataset.column_names)     # a misspelt column ends here, before step 0
    scores = score(rewards, completions, prompts=…, completion_ids=…, columns={"answer": […]})
    torch.tensor(scores.totals).view(P, G)           # NaN where an answer could not be scored

A reward that raises or hangs never ends a run: its answers count as None, the call is counted and
reported once. One that returns the wrong number of values, or something else than numbers, has a
bug that no step will mend: that is an error.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.deadline import Failure, call_with_deadline
from posttrain.rewards.text import Completion, completion_text

Reward = Callable[..., Any]  # returns N numbers or None, see the package's docstring
Rewards = Mapping[str, tuple[Reward, float]]

CALL_KEYWORDS = ("prompts", "completions", "completion_ids")
# Not one value for each answer: handed on as they are when the caller puts them among the columns.
RUN_KEYWORDS = ("trainer_state", "log_extra", "log_metric")

_logger = logging.getLogger(__name__)
_reported: set[tuple[str, str]] = set()  # (reward, kind of failure)


@dataclass(frozen=True)
class Scores:
    """What one call of `score` found, for N answers in the order they were given.

    Attributes:
        totals: N weighted sums of the parts; NaN where a part with a weight is None.
        parts: For each reward N values, unweighted; None where it could not score.
        errors: Rewards that raised in this call.
        timeouts: Rewards that passed their deadline in this call.
        none: Answers without a total.
        failures: For each reward that failed, what happened, in one line.
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


def check_rewards(rewards: Rewards, columns: Sequence[str]) -> None:
    """Can each reward be called with this data? Reads signatures, calls nothing.

    Args:
        rewards: Name to (reward, weight).
        columns: The data's column names.

    Raises:
        ConfigError: No reward with a weight other than 0, an entry that is not (reward, weight),
            or a reward with a required argument that is neither a column, nor `prompts`,
            `completions`, `completion_ids` or `trainer_state`, or that has to go by position.
    """
    for name, entry in rewards.items():
        if not (isinstance(entry, tuple) and len(entry) == 2 and callable(entry[0])):
            raise ConfigError(
                f"reward {name!r}: expected a pair (function, weight), found {entry!r}."
            )
        reward, weight = entry
        if not (_is_number(weight) and math.isfinite(weight)):
            raise ConfigError(f"reward {name!r}: expected a finite weight, found {weight!r}.")
        _check_arguments(name, reward, columns)
    if not any(weight for _, weight in rewards.values()):
        raise ConfigError("expected a reward with a weight other than 0; found none to learn from.")


def score(
    rewards: Rewards,
    completions: Sequence[Completion],
    *,
    prompts: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Any],
    timeout_seconds: float = 60.0,
) -> Scores:
    """Call each reward once, by keyword, with all N answers, and add up what they return.

    An answer's total is the sum of weight times part. A part that is None (or NaN, or infinite)
    leaves the answer without a total, unless its weight is 0: half a sum would be compared with
    whole ones in its group. (TRL instead sums what there is.)

    Each reward runs in a thread with a deadline; what that cannot stop: `deadline`.

    Args:
        rewards: Name to (reward, weight), checked before with `check_rewards`. A reward without
            `**kwargs` gets only the arguments it names; a coroutine function is awaited.
        completions: N texts, or N lists of chat messages.
        prompts: N prompts.
        completion_ids: N lists of token ids.
        columns: The data's other columns, N values each. `trainer_state`, `log_extra` and
            `log_metric`, if among them, are handed on as they are.
        timeout_seconds: For each reward's call with all N answers.

    Raises:
        ConfigError: A reward returned another number of values than N, or not numbers.
        ValueError: Arguments of different lengths.
    """
    call = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    arguments = {**columns, **call}
    num_answers = len(completions)
    for name, values in arguments.items():
        if name not in RUN_KEYWORDS and len(values) != num_answers:
            raise ValueError(f"expected {num_answers} values in {name!r}, found {len(values)}.")
    parts: dict[str, list[float | None]] = {}
    failures: dict[str, Failure] = {}
    for name, (reward, _) in rewards.items():
        result, failure = call_with_deadline(
            functools.partial(_call, reward, arguments), timeout_seconds=timeout_seconds
        )
        if failure is None:
            parts[name] = _checked_values(name, result, num_answers)
        else:
            parts[name] = [None] * num_answers
            failures[name] = failure
            _report_once(name, failure, num_answers)
    totals = _weighted_totals(parts, rewards, num_answers)
    timeouts = sum(failure.is_timeout for failure in failures.values())
    return Scores(
        totals=totals,
        parts=parts,
        errors=len(failures) - timeouts,
        timeouts=timeouts,
        none=sum(map(math.isnan, totals)),
        failures={name: failure.what for name, failure in failures.items()},
    )


def with_messages(reward: Reward) -> Reward:
    """A reward that reads chat messages, as TRL's own do, for answers that are plain text.

    It gets each completion as `[{"role": "assistant", "content": text}]`.
    """

    @functools.wraps(reward)
    def on_messages(*, completions: Sequence[Completion], **arguments: Any) -> Any:
        texts = map(completion_text, completions)
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        return reward(completions=chats, **arguments)

    return on_messages


def _check_arguments(name: str, reward: Reward, columns: Sequence[str]) -> None:
    function = _callable_name(reward)
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError) as error:  # some callables written in C have none
        raise ConfigError(
            f"reward {name!r} ({function}): its arguments cannot be read. "
            "Wrap it in a function that names them."
        ) from error
    known = {*columns, *CALL_KEYWORDS, "trainer_state"}
    for argument in parameters:
        if argument.kind is argument.POSITIONAL_ONLY:
            raise ConfigError(
                f"reward {name!r} ({function}): {argument.name!r} can only be given by position, "
                "and rewards are called by keyword. Remove the '/' from its signature."
            )
        is_variadic = argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
        if is_variadic or argument.default is not argument.empty or argument.name in known:
            continue
        nearest = difflib.get_close_matches(argument.name, columns, n=1, cutoff=0.5)
        hint = f" Nearest: {nearest[0]!r}." if nearest else ""
        raise ConfigError(
            f"reward {name!r} ({function}) needs {argument.name!r}, and the data has no such "
            f"column.{hint} Columns found: {', '.join(columns) or 'none'}. Rename the column, or "
            f"bind the argument: functools.partial({function}, {argument.name}=…)."
        )


def _callable_name(reward: Any) -> str:
    function = reward.func if isinstance(reward, functools.partial) else reward
    return getattr(function, "__name__", type(function).__name__)


def _call(reward: Reward, arguments: dict[str, Any]) -> Any:
    """Call the reward with those of the arguments that it can take."""
    parameters = inspect.signature(reward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: values for name, values in arguments.items() if name in parameters}
    return reward(**arguments)


def _report_once(name: str, failure: Failure, num_answers: int) -> None:
    if (name, failure.kind) in _reported:
        return
    _reported.add((name, failure.kind))
    _logger.warning(
        "reward %r failed: %s. Its %d answers cannot be scored and are left out. "
        "The run goes on; later failures of this kind are only counted.",
        name,
        failure.what,
        num_answers,
    )


def _is_number(value: Any) -> bool:
    """Python's, numpy's and torch's numbers alike; not text."""
    return hasattr(value, "__float__")


def _checked_values(name: str, result: Any, num_answers: int) -> list[float | None]:
    """The reward's N values as floats, or ConfigError."""
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, (list, tuple)):
        raise ConfigError(
            f"reward {name!r}: expected a list of {num_answers} numbers or None, "
            f"found {type(result).__name__}."
        )
    if len(values) != num_answers:
        raise ConfigError(
            f"reward {name!r}: expected {num_answers} values, one for each answer, "
            f"found {len(values)}."
        )
    for row, value in enumerate(values):
        if value is not None and not _is_number(value):
            raise ConfigError(
                f"reward {name!r}, value {row}: expected a number or None, found {value!r}."
            )
    numbers = [None if value is None else float(value) for value in values]
    return [x if x is not None and math.isfinite(x) else None for x in numbers]


def _weighted_totals(
    parts: dict[str, list[float | None]], rewards: Rewards, num_answers: int
) -> list[float]:
    weights = {name: weight for name, (_, weight) in rewards.items() if weight}
    totals = []
    for row in range(num_answers):
        terms = [(weight, parts[name][row]) for name, weight in weights.items()]
        is_scored = all(value is not None for _, value in terms)
        totals.append(math.fsum(w * v for w, v in terms) if is_scored else math.nan)
    return totals
