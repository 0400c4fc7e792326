"""Calling one reward on its completions in pieces, in worker processes if possible.

    finish = start_call(Call("correct", math_reward, arguments, num_completions=128))
    values, failures = finish()      # 128 numbers or None, and what went wrong

A worker can be killed, so that neither an endless loop nor a crash in C reaches the caller, whose
process is meanwhile free to generate the next completions. Functions of modules, and partials of
them, are sent to workers. All others run here, in a thread: objects, whose state would differ
between workers, closures, functions of `__main__`, rewards that carry a model, and those that ask
for one of `RUN_KEYWORDS`.

A piece is the group of one prompt, because a reward may compare a prompt's completions. A reward
that is marked `per_completion` is cut into pieces of any size. If such a piece fails, each of its
completions is tried alone, so that one that hangs or raises costs only itself. Verdicts are counted
by kind (`count_verdict`), and a reward may tell the rule that decided each completion
(`note_rules`), in the workers too.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import io
import math
import os
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple, SupportsFloat, TypeAlias, TypeGuard

from posttrain.errors import ConfigError
from posttrain.workers.deadline import Failure, attempt, call_with_deadline, timed_out
from posttrain.workers.pool import Json, WorkerPool

Values: TypeAlias = "Sequence[SupportsFloat | None]"
Reward = Callable[..., Values]  # see the package's docstring
Arguments: TypeAlias = "Mapping[str, Sequence[object]]"  # N values each; RUN_KEYWORDS: anything

# Arguments that are not one value per completion. They are passed on as they are, to rewards that
# run in this process.
RUN_KEYWORDS = ("trainer_state", "log_extra", "log_metric")
PIECE_COMPLETIONS = 16  # per piece of a `per_completion` reward: enough to hide the transport
MAX_PICKLE_BYTES = 1 << 20  # a heavier reward carries a model, which has to stay where it is
DEFAULT_TIMEOUT_SECONDS = 30.0
MAX_TIMEOUTS_PER_PIECE = 3  # a reward that hangs on everything must not cost an hour per step


def per_completion(reward: Reward) -> Reward:
    """Mark a reward that scores each completion by itself, whatever else is in the call."""
    reward.is_per_completion = True
    return reward


per_answer = per_completion  # the earlier name


def default_workers() -> int:
    """Return the number of workers: up to four, and at most this rank's share of the cores."""
    cores = os.cpu_count() or 1
    return max(1, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@dataclass(frozen=True)
class Call:
    """One reward and its arguments.

    Attributes:
        name: The reward's name in the table of rewards.
        reward: The reward.
        arguments: Keyword to N values each, for N completions; `RUN_KEYWORDS` to anything.
        num_completions: N.
        timeout_seconds: Deadline of a piece in a worker, or of the whole call in this process.
        num_workers: Number of worker processes; 0 keeps the call in this process.
    """

    name: str
    reward: Reward
    arguments: Arguments
    num_completions: int
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    num_workers: int = 1

    def rows(self, rows: Sequence[int]) -> Call:
        """Return the same call for some of the completions."""
        arguments = {
            name: values if name in RUN_KEYWORDS else [values[row] for row in rows]
            for name, values in self.arguments.items()
        }
        return replace(self, arguments=arguments, num_completions=len(rows))


class Result(NamedTuple):
    """N values, None for a completion without one, and a Failure for each call that failed.

    `rules` are N sentences or None; empty where the reward told none.
    """

    values: list[float | None]
    failures: list[Failure]
    rules: Sequence[str | None] = ()


def start_call(call: Call) -> Callable[[], Result]:
    """Begin the call. The function that is returned waits for its result.

    Raises:
        ConfigError: (in that function) The reward returned a wrong number of values, or values that
            are not numbers.
    """
    pickled = portable(call.reward) if call.num_workers else None
    if pickled is None:
        return _workforce(call.num_workers).here.submit(_call_here, call).result
    pieces = _pieces(call)
    submit = _workforce(call.num_workers).threads.submit
    futures = [submit(_call_piece, call.rows(piece), pickled) for piece in pieces]
    return functools.partial(_gather, pieces, futures, call.num_completions)


def portable(reward: Reward) -> bytes | None:
    """Pickle the reward for a worker. None if it has to stay in this process."""
    function = innermost(reward)
    wants_run = any(name in RUN_KEYWORDS for name in inspect.signature(reward).parameters)
    if wants_run or not inspect.isfunction(function) or function.__module__ == "__main__":
        return None
    buffer = _Bounded()
    try:
        pickle.Pickler(buffer, protocol=5).dump(reward)
    except Exception:  # pickle raises whatever the methods of an object raise
        return None
    return buffer.getvalue()


def innermost(reward: Reward) -> Reward:
    """Return the function below partials and wrappers, which carries the marks."""
    while True:
        if isinstance(reward, functools.partial):
            reward = reward.func
        elif hasattr(reward, "__wrapped__"):
            reward = reward.__wrapped__
        else:
            return reward


def _is_per_completion(reward: Reward) -> bool:
    return getattr(innermost(reward), "is_per_completion", False)


class _Bounded(io.BytesIO):
    def write(self, data: bytes | bytearray | memoryview) -> int:
        if self.tell() + len(memoryview(data)) > MAX_PICKLE_BYTES:
            raise OverflowError("too large to send to a worker")
        return super().write(data)


class _Workforce:
    """Worker processes, a thread that waits for each, and one thread for calls that stay here."""

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
    """Return the row numbers of each piece."""
    rows = range(call.num_completions)
    if _is_per_completion(call.reward):
        return [list(rows[i : i + PIECE_COMPLETIONS]) for i in rows[::PIECE_COMPLETIONS]]
    prompts = call.arguments["prompts"]
    return [list(group) for _, group in groupby(rows, key=lambda row: prompts[row])]


def _gather(pieces: list[list[int]], futures: list[Future], num_completions: int) -> Result:
    values: list[float | None] = [None] * num_completions
    failures: list[Failure] = []
    rules: list[str | None] = [None] * num_completions
    for piece, future in zip(pieces, futures, strict=True):
        found = future.result()
        failures += found.failures
        for place, row in enumerate(piece):
            values[row] = found.values[place]
            rules[row] = found.rules[place] if found.rules else None
    return Result(values, failures, rules)


def _call_here(call: Call) -> Result:
    told, failure = call_with_deadline(
        functools.partial(
            _with_rules, call.reward, accepted(call.reward, call.arguments), call.num_completions
        ),
        timeout_seconds=call.timeout_seconds,
    )
    if failure:
        return Result([None] * call.num_completions, [failure])
    value, rules = told
    return Result(checked_values(call.name, value, call.num_completions), [], rules)


def _call_piece(call: Call, pickled: bytes) -> Result:
    """Call a piece in a worker. After a failure, try each completion alone if that is possible."""
    found = _call_there(call, pickled)
    if not found.failures or call.num_completions == 1 or not _is_per_completion(call.reward):
        return found
    values: list[float | None] = [None] * call.num_completions
    failures: list[Failure] = []
    rules: list[str | None] = [None] * call.num_completions
    for row in range(call.num_completions):
        if sum(failure.is_timeout for failure in failures) < MAX_TIMEOUTS_PER_PIECE:
            alone = _call_there(call.rows([row]), pickled)
            values[row], rules[row] = alone.values[0], next(iter(alone.rules), None)
            failures += alone.failures
    return Result(values, failures, rules)


def _call_there(call: Call, pickled: bytes) -> Result:
    arguments = accepted(call.reward, call.arguments)
    sendable = {name: values for name, values in arguments.items() if name not in RUN_KEYWORDS}
    request = (pickled, call.name, sendable, call.num_completions)
    reply = _workforce(call.num_workers).pool.call(request, timeout_seconds=call.timeout_seconds)
    nothing: list[float | None] = [None] * call.num_completions
    if reply.problem == "timeout":
        return Result(nothing, [timed_out(call.timeout_seconds)])
    if reply.problem:
        return Result(nothing, [Failure(reply.problem, reply.detail or reply.problem)])
    found = reply.value
    add_verdicts(found["tally"])
    if "mistake" in found:
        raise ConfigError(found["mistake"])
    if "failure" in found:
        return Result(nothing, [Failure(*found["failure"])])
    if "unknown" in found:  # a module that only this process can import
        return _call_here(call)
    return Result(found["values"], [], found["rules"])


# The functions below run in the worker.


Request: TypeAlias = "tuple[bytes, str, dict[str, object], int]"  # see `_call_there`


@functools.lru_cache(maxsize=32)
def _loaded(pickled: bytes) -> Reward:
    return pickle.loads(pickled)


def serve(request: Request) -> dict[str, Json]:
    """Answer a request in a worker, in plain data.

    Returns:
        "values" of the reward and its "rules", or why there are none: "failure" (it raised),
        "mistake" (its result is unusable) or "unknown" (it cannot be loaded here); and the "tally"
        of verdicts.
    """
    return {**_serve(request), "tally": take_verdicts()}


def _serve(request: Request) -> dict[str, Json]:
    pickled, name, arguments, num_completions = request
    reward, failure = attempt(functools.partial(_loaded, pickled))
    if failure:
        return {"unknown": failure.what}
    told, failure = attempt(functools.partial(_with_rules, reward, arguments, num_completions))
    if failure:
        return {"failure": [failure.kind, failure.what]}
    value, rules = told
    try:
        return {"values": checked_values(name, value, num_completions), "rules": rules}
    except ConfigError as error:
        return {"mistake": str(error)}


def accepted(reward: Reward, arguments: Mapping[str, object]) -> dict[str, object]:
    """Select the arguments that the reward's signature has, or all if it takes any."""
    parameters = inspect.signature(reward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {name: values for name, values in arguments.items() if name in parameters}


def is_number(value: object) -> TypeGuard[SupportsFloat]:
    """Tell whether a value is a number, be it Python's, numpy's or torch's. Text is none."""
    return hasattr(value, "__float__")


def checked_values(name: str, result: object, num_completions: int) -> list[float | None]:
    """Convert a reward's result to N floats, with None for values that are not finite.

    Raises:
        ConfigError: The result is not a list of N numbers or None.
    """
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, (list, tuple)):
        raise ConfigError(
            f"reward {name!r}: expected a list of {num_completions} numbers or None, "
            f"found {type(result).__name__}."
        )
    if len(values) != num_completions:
        raise ConfigError(
            f"reward {name!r}: expected {num_completions} values, one per completion, "
            f"found {len(values)}."
        )
    for row, value in enumerate(values):
        if value is not None and not is_number(value):
            raise ConfigError(
                f"reward {name!r}, value {row}: expected a number or None, found {value!r}."
            )
    numbers = [None if value is None else float(value) for value in values]
    return [x if x is not None and math.isfinite(x) else None for x in numbers]


_thread = threading.local()


def note_rules(rules: Sequence[str]) -> None:
    """Tell the rule that decided each completion of the call that is running, for samples.jsonl."""
    _thread.rules = list(rules)


def _with_rules(
    reward: Reward, arguments: Mapping[str, object], num_completions: int
) -> tuple[Values, list[str | None]]:
    """Call a reward; return its result, and the rules that it told in this thread, if it did."""
    _thread.rules = []
    result = reward(**arguments)
    result = asyncio.run(result) if inspect.iscoroutine(result) else result
    told = _thread.rules
    return result, told if len(told) == num_completions else [None] * num_completions


_counts: Counter[str] = Counter()
_lock = threading.Lock()


def count_verdict(kind: str) -> None:
    """Count one verdict of this kind."""
    with _lock:
        _counts[kind] += 1


def add_verdicts(counts: Mapping[str, int]) -> None:
    """Add the counts of another process."""
    with _lock:
        _counts.update(counts)


def take_verdicts() -> Counter[str]:
    """Return the counts since the last call, and start again at zero."""
    with _lock:
        taken = Counter(_counts)
        _counts.clear()
    return taken
