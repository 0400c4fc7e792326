"""Calling one reward with its answers in pieces, in worker processes where that can be done.

    finish = start_call(Call("correct", math_reward, arguments, num_answers=128))
    values, failures = finish()      # 128 numbers or None, and what went wrong

A worker can be killed, so neither an endless loop nor a crash in C reaches the caller, and the
caller's process is free meanwhile, to draw the next answers. Functions of modules are sent, also
as partials. The rest runs here, in a thread: objects, whose state would be another in each worker,
closures, functions of `__main__`, what carries a model, and what asks for one of `RUN_KEYWORDS`.

A piece is one prompt's group, since a reward may compare a prompt's answers. One that is marked
`per_answer` is cut as is convenient, and where a piece of it fails, each of its answers is tried
alone: one that hangs or raises costs itself only.
"""

from __future__ import annotations

import functools
import inspect
import io
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from posttrain.errors import ConfigError
from posttrain.rewards import tally
from posttrain.workers.deadline import Failure, attempt, call_with_deadline, timed_out
from posttrain.workers.pool import WorkerPool

Reward = Callable[..., Any]  # returns N numbers or None, see the package's docstring

# Not one value for each answer: handed on as they are, to rewards that run in this process.
RUN_KEYWORDS = ("trainer_state", "log_extra", "log_metric")
PIECE_ANSWERS = 16  # of a reward that scores each answer by itself: enough to hide the transport
MAX_PICKLE_BYTES = 1 << 20  # what weighs more carries a model, which belongs where it is
DEFAULT_TIMEOUT_SECONDS = 30.0
MAX_TIMEOUTS_PER_PIECE = 3  # a reward that hangs on everything must not cost an hour a step


def per_answer(reward: Reward) -> Reward:
    """Marks a reward that scores each answer by itself, whatever else is in the call."""
    reward.is_per_answer = True
    return reward


def default_workers() -> int:
    """Up to four, and not more than the cores that each of this machine's ranks has."""
    cores = os.cpu_count() or 1
    return max(1, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@dataclass(frozen=True)
class Call:
    """One reward and what it is called with.

    Attributes:
        name, reward: As in the table of rewards.
        arguments: Keyword to N values each, N answers; `RUN_KEYWORDS` to anything.
        timeout_seconds: For a piece in a worker; for all N answers together in this process.
        num_workers: 0 keeps the call in this process.
    """

    name: str
    reward: Reward
    arguments: Mapping[str, Any]
    num_answers: int
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    num_workers: int = 1

    def rows(self, rows: Sequence[int]) -> Call:
        """The same call with some of the answers."""
        arguments = {
            name: values if name in RUN_KEYWORDS else [values[row] for row in rows]
            for name, values in self.arguments.items()
        }
        return Call(
            self.name, self.reward, arguments, len(rows), self.timeout_seconds, self.num_workers
        )


class Result(NamedTuple):
    """N values, None where there is none, and a Failure for each call that failed."""

    values: list[float | None]
    failures: list[Failure]


def start_call(call: Call) -> Callable[[], Result]:
    """Begin the call; the function that is returned waits for its result.

    Raises (from that function) ConfigError where the reward returned another number of values than
    it was given answers, or something else than numbers.
    """
    pickled = portable(call.reward) if call.num_workers else None
    if pickled is None:
        return _workforce(call.num_workers).here.submit(_call_here, call).result
    pieces = _pieces(call)
    submit = _workforce(call.num_workers).threads.submit
    futures = [submit(_call_piece, call.rows(piece), pickled) for piece in pieces]
    return functools.partial(_gather, pieces, futures, call.num_answers)


def portable(reward: Reward) -> bytes | None:
    """The reward as a worker can load it; None where it has to stay in this process."""
    function = innermost(reward)
    wants_run = any(name in RUN_KEYWORDS for name in inspect.signature(reward).parameters)
    if wants_run or not inspect.isfunction(function) or function.__module__ == "__main__":
        return None
    buffer = _Bounded()
    try:
        pickle.Pickler(buffer, protocol=5).dump(reward)
    except Exception:  # pickle raises whatever an object's own methods raise
        return None
    return buffer.getvalue()


def innermost(reward: Reward) -> Any:
    """What stands below partials and wrappers, and carries the marks."""
    while True:
        if isinstance(reward, functools.partial):
            reward = reward.func
        elif hasattr(reward, "__wrapped__"):
            reward = reward.__wrapped__
        else:
            return reward


def _is_per_answer(reward: Reward) -> bool:
    return getattr(innermost(reward), "is_per_answer", False)


class _Bounded(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + len(memoryview(data)) > MAX_PICKLE_BYTES:
            raise OverflowError("too large to send to a worker")
        return super().write(data)


class _Workforce:
    """Worker processes, a thread to wait for each, and one thread for what runs here, in turn."""

    def __init__(self, num_workers: int) -> None:
        self.here = ThreadPoolExecutor(1, thread_name_prefix="rewards-here")
        if num_workers:
            self.pool = WorkerPool(
                "posttrain.rewards.pieces:serve", num_workers=num_workers, shows_output=True
            )
            self.threads = ThreadPoolExecutor(num_workers, thread_name_prefix="rewards")


@functools.cache
def _workforce_of(_process: int, num_workers: int) -> _Workforce:
    return _Workforce(num_workers)


def _workforce(num_workers: int) -> _Workforce:
    return _workforce_of(os.getpid(), num_workers)  # a fork has none of its parent's threads


def _pieces(call: Call) -> list[list[int]]:
    """Row numbers of each piece."""
    rows = range(call.num_answers)
    if _is_per_answer(call.reward):
        return [list(rows[i : i + PIECE_ANSWERS]) for i in rows[::PIECE_ANSWERS]]
    prompts = call.arguments["prompts"]
    return [list(group) for _, group in groupby(rows, key=lambda row: prompts[row])]


def _gather(pieces: list[list[int]], futures: list[Future], num_answers: int) -> Result:
    values: list[float | None] = [None] * num_answers
    failures: list[Failure] = []
    for piece, future in zip(pieces, futures, strict=True):
        found = future.result()
        failures += found.failures
        for row, value in zip(piece, found.values, strict=True):
            values[row] = value
    return Result(values, failures)


def _call_here(call: Call) -> Result:
    value, failure = call_with_deadline(
        functools.partial(call.reward, **accepted(call.reward, call.arguments)),
        timeout_seconds=call.timeout_seconds,
    )
    if failure:
        return Result([None] * call.num_answers, [failure])
    return Result(checked_values(call.name, value, call.num_answers), [])


def _call_piece(call: Call, pickled: bytes) -> Result:
    """In a worker; where a `per_answer` reward fails, each answer gets a second try alone."""
    found = _call_there(call, pickled)
    if not found.failures or call.num_answers == 1 or not _is_per_answer(call.reward):
        return found
    values: list[float | None] = [None] * call.num_answers
    failures: list[Failure] = []
    for row in range(call.num_answers):
        if sum(failure.is_timeout for failure in failures) < MAX_TIMEOUTS_PER_PIECE:
            alone = _call_there(call.rows([row]), pickled)
            values[row] = alone.values[0]
            failures += alone.failures
    return Result(values, failures)


def _call_there(call: Call, pickled: bytes) -> Result:
    arguments = accepted(call.reward, call.arguments)
    sendable = {name: values for name, values in arguments.items() if name not in RUN_KEYWORDS}
    request = (pickled, call.name, sendable, call.num_answers)
    reply = _workforce(call.num_workers).pool.call(request, timeout_seconds=call.timeout_seconds)
    nothing: list[float | None] = [None] * call.num_answers
    if reply.problem == "timeout":
        return Result(nothing, [timed_out(call.timeout_seconds)])
    if reply.problem:
        return Result(nothing, [Failure(reply.problem, reply.detail or reply.problem)])
    answer = reply.value
    tally.add(answer["tally"])
    if "mistake" in answer:
        raise ConfigError(answer["mistake"])
    if "failure" in answer:
        return Result(nothing, [Failure(*answer["failure"])])
    if "unknown" in answer:  # a module that only this process can import
        return _call_here(call)
    return Result(answer["values"], [])


# In the worker.


@functools.lru_cache(maxsize=32)
def _loaded(pickled: bytes) -> Reward:
    return pickle.loads(pickled)


def serve(request: tuple[bytes, str, dict[str, Any], int]) -> dict[str, Any]:
    """What a worker answers: values, or why there are none, and what was counted. Plain data."""
    return {**_serve(request), "tally": tally.take()}


def _serve(request: tuple[bytes, str, dict[str, Any], int]) -> dict[str, Any]:
    pickled, name, arguments, num_answers = request
    reward, failure = attempt(functools.partial(_loaded, pickled))
    if failure:
        return {"unknown": failure.what}
    value, failure = attempt(functools.partial(reward, **arguments))
    if failure:
        return {"failure": [failure.kind, failure.what]}
    try:
        return {"values": checked_values(name, value, num_answers)}
    except ConfigError as error:
        return {"mistake": str(error)}


def accepted(reward: Reward, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that its signature has, or all if it takes any."""
    parameters = inspect.signature(reward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {name: values for name, values in arguments.items() if name in parameters}


def is_number(value: Any) -> bool:
    """Python's, numpy's and torch's numbers alike; not text."""
    return hasattr(value, "__float__")


def checked_values(name: str, result: Any, num_answers: int) -> list[float | None]:
    """The reward's N values as floats, None for what is not finite; or ConfigError."""
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
        if value is not None and not is_number(value):
            raise ConfigError(
                f"reward {name!r}, value {row}: expected a number or None, found {value!r}."
            )
    numbers = [None if value is None else float(value) for value in values]
    return [x if x is not None and math.isfinite(x) else None for x in numbers]
