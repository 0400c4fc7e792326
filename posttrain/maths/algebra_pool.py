"""Asking `algebra` in worker processes that can be killed: bounded time and memory, remembered.

ask_algebra((Pair("value", "x + 1", "1 + x"),))    # ("equal",)
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from posttrain.workers.pool import WorkerPool

LIMIT_SECONDS = 3.0
NUM_WORKERS = 2
MEMORY_BYTES = 1 << 30  # beyond what SymPy itself takes
MAX_REMEMBERED = 50_000

pool = WorkerPool(
    "posttrain.maths.algebra:equal_pairs", num_workers=NUM_WORKERS, memory_bytes=MEMORY_BYTES
)


class Pair(NamedTuple):
    """One question to algebra; see `algebra.equal_pairs`."""

    kind: str
    gold: str
    answer: str
    decimals: int | None = None


class AlgebraTimeout(Exception):
    """No decision in `LIMIT_SECONDS`."""


class AlgebraRefused(Exception):
    """The worker died or ran out of memory over this question, and again over it alone."""


class AlgebraUnavailable(Exception):
    """No worker can be had: nothing that the question is to blame for."""


@lru_cache(maxsize=MAX_REMEMBERED)
def _asked(pairs: tuple[Pair, ...]) -> tuple[str, ...] | str:
    request = [list(pair) for pair in pairs]
    reply = pool.call(request, timeout_seconds=LIMIT_SECONDS)
    if reply.problem == "crashed":  # perhaps by another hand; once more tells
        reply = pool.call(request, timeout_seconds=LIMIT_SECONDS)
    if reply.problem == "not started":
        raise AlgebraUnavailable(reply.detail)  # raised, so that it is not remembered
    return reply.problem or tuple(reply.value)


def ask_algebra(pairs: tuple[Pair, ...]) -> tuple[str, ...]:
    """For each pair "equal", "different" or "gold unreadable". Any thread may call.

    All pairs together have `LIMIT_SECONDS`. What was asked before is answered from memory, a
    timeout included.

    Raises:
        AlgebraTimeout, AlgebraRefused, AlgebraUnavailable: There is no decision.
    """
    answer = _asked(pairs)
    if answer == "timeout":
        raise AlgebraTimeout
    if isinstance(answer, str):
        raise AlgebraRefused(answer)
    return answer
