"""Calling a function of the user that may raise or hang, with a deadline.

    value, failure = call_with_deadline(lambda: 1 / 0, timeout_seconds=5)
    failure.what        # "ZeroDivisionError: division by zero (my_rewards.py, line 3)"

A thread cannot be killed, only asked to stop. For code that can be sent to a process, use `pool`.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import threading
import traceback
from collections.abc import Callable
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")


class Failure(NamedTuple):
    """The reason why there is no value: the kind of exception, and what happened in one line."""

    kind: str
    what: str
    is_timeout: bool = False


def attempt(call: Callable[[], Result]) -> tuple[Result | None, Failure | None]:
    """Call the function; return (value, None), or (None, failure) if it raised.

    A coroutine that it returns is awaited.
    """
    try:
        value = call()
        return (asyncio.run(value) if inspect.iscoroutine(value) else value), None
    except BaseException as error:  # sys.exit() in a reward must not end the run either
        return None, _describe(error)


def call_with_deadline(
    call: Callable[[], Result], *, timeout_seconds: float
) -> tuple[Result | None, Failure | None]:
    """Do `attempt` in a new thread; return (None, failure) if it runs past the deadline.

    At the deadline the thread is asked to stop, which ends a loop in Python. A call into C that
    hangs keeps its thread (a daemon) until it returns; one that also holds the interpreter's lock,
    as a runaway regular expression does, delays the deadline itself: only a process could be ended.
    """
    outcome: list[tuple[Result | None, Failure | None]] = []
    thread = threading.Thread(target=lambda: outcome.append(attempt(call)), daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if outcome:
        return outcome[0]
    _ask_to_stop(thread)
    return None, timed_out(timeout_seconds)


def timed_out(timeout_seconds: float) -> Failure:
    """Make the Failure of a call that ran past its deadline."""
    return Failure("deadline", f"no result after {timeout_seconds:g} seconds", is_timeout=True)


def _describe(error: BaseException) -> Failure:
    last_line = traceback.format_exception_only(type(error), error)[-1].strip()
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{last_line} ({frame.filename}, line {frame.lineno})"
    return Failure(kind=type(error).__name__, what=what)


def _ask_to_stop(thread: threading.Thread) -> None:
    """Raise SystemExit in the thread at its next Python instruction.

    Otherwise each step would add one more endless loop that competes for the interpreter.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
    )
