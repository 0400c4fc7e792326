"""Questions to computer algebra, answered in worker processes that can be killed.

    ask_algebra((Pair("value", "x + 1", "1 + x"),))    # ("equal",)

Time and memory of a question are bounded, and answers are remembered. The workers start at the
first question, and run `algebra_worker`. This process imports neither that module nor SymPy, which
would cost every process with a reward 30 MB, and which can evaluate text.
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
    "posttrain.maths.algebra_worker:equal_pairs", num_workers=NUM_WORKERS, memory_bytes=MEMORY_BYTES
)


class Pair(NamedTuple):
    """One question: are two expressions equal? See `algebra_worker.equal_pairs`."""

    kind: str
    gold: str
    answer: str
    decimals: int | None = None


class AlgebraTimeout(Exception):
    """There was no decision in `LIMIT_SECONDS`."""


class AlgebraRefused(Exception):
    """The worker died or ran out of memory over this question, twice."""


class AlgebraUnavailable(Exception):
    """No worker can be started. The question is not to blame."""


@lru_cache(maxsize=MAX_REMEMBERED)
def _asked(pairs: tuple[Pair, ...]) -> tuple[str, ...] | str:
    request = [list(pair) for pair in pairs]
    reply = pool.call(request, timeout_seconds=LIMIT_SECONDS)
    if reply.problem == "crashed":  # perhaps for another reason, so ask once more
        reply = pool.call(request, timeout_seconds=LIMIT_SECONDS)
    if reply.problem == "not started":
        raise AlgebraUnavailable(reply.detail)  # raised, so that it is not remembered
    return reply.problem or tuple(reply.value)


def ask_algebra(pairs: tuple[Pair, ...]) -> tuple[str, ...]:
    """Decide for each pair whether it is "equal", "different" or "gold unreadable".

    All pairs together have `LIMIT_SECONDS`. A question asked before, one that timed out included,
    is answered from memory. Any thread may call.

    Raises:
        AlgebraTimeout: There was no decision in time.
        AlgebraRefused: The worker died over the question.
        AlgebraUnavailable: No worker can be started.
    """
    answer = _asked(pairs)
    if answer == "timeout":
        raise AlgebraTimeout
    if isinstance(answer, str):
        raise AlgebraRefused(answer)
    return answer
