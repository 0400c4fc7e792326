"""Running untrusted Python on this machine.

    with Sandbox() as sandbox:
        sandbox.run("print(int(input()) + 1)", stdin="41").stdout     # "42\\n"
        with sandbox.open("def double(x): return 2 * x") as session:
            session.call("double", [21]).data                         # 42

The strongest isolation that works on this machine is found by trying (`tier`, `describe`). If none
works, SandboxUnavailableError says what failed. docs/sandbox.md lists what this protects from, and
what it does not protect from.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial

from posttrain.sandbox import wire
from posttrain.sandbox.exchange import Exchange, conclude
from posttrain.sandbox.interface import HostCall, Limits, RunResult, Value
from posttrain.sandbox.session import LocalSession
from posttrain.sandbox.tiers import TIERS, Description, find_tier
from posttrain.sandbox.wire import PlainData
from posttrain.sandbox.worker import ONE_RUN_TIER, Worker, WorkerError

logger = logging.getLogger(__name__)

MAX_DETAIL = 300
NO_ISOLATION = (
    "Untrusted code runs WITHOUT isolation (tier='none'): it can read, change and send whatever "
    "this user can."
)

_SANDBOXES: weakref.WeakSet[Sandbox] = weakref.WeakSet()


class Sandbox:
    """An `Executor` on this machine.

    It starts at its first use. Threads may share it, and it works in forked processes and through
    pickle: every process has its own workers.

    Args:
        tier: "auto", or one of "namespaces", "landlock", "bubblewrap". "none" runs the code without
            any isolation, with this user's rights, and warns at every start.
        allow_subprocess: Let the code fork and execute programs of the system. Needs a tier with
            process namespaces.
        num_workers: Number of runs at a time; None is one per processor.
        limits: The limits of runs that are given none.
    """

    def __init__(
        self,
        *,
        tier: str = "auto",
        allow_subprocess: bool = False,
        num_workers: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        if tier not in ("auto", "none", *TIERS):
            raise ValueError(f"tier={tier!r}. Expected auto, none, {', '.join(TIERS)}.")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers={num_workers}. Expected at least 1.")
        self._wanted_tier = tier
        self._allow_subprocess = allow_subprocess
        self._num_workers = num_workers or count_processors()
        self._limits = limits or Limits()
        self._description: Description = {}
        self._reset()
        _SANDBOXES.add(self)

    def _reset(self) -> None:
        self._starting = threading.Lock()
        self._pool: Pool | None = None
        self._finalizer: weakref.finalize | None = None

    def __getstate__(self) -> dict[str, object]:
        return {
            "tier": self._wanted_tier,
            "allow_subprocess": self._allow_subprocess,
            "num_workers": self._num_workers,
            "limits": self._limits,
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)

    @property
    def tier(self) -> str:
        """The isolation in use. Starts the sandbox."""
        return self.describe()["tier"]

    def describe(self) -> Description:
        """Describe the isolation for a run's metadata, and start the sandbox.

        Returns:
            "tier"; "canaries", the result of each attempt to escape; "not_used", for each better
            tier why it was not used; and notes of the worker, such as its "user".

        Raises:
            SandboxUnavailableError: No tier holds on this machine.
        """
        self._started_pool()
        return dict(self._description)

    def run(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        host_call: HostCall | None = None,
    ) -> RunResult:
        """Run `code` as a program. See `Executor.run`."""
        limits = limits or self._limits
        try:
            job = wire.frame({"code": code, "serve": False, "host_call": host_call is not None})
        except wire.WireError as problem:
            return RunResult("error", detail=f"the code cannot be sent: {problem}")
        data = stdin.encode("utf-8", "replace")
        result = self._run(job, data, limits, host_call)
        if result.status == "failed" and host_call is None:
            return self._run(job, data, limits, None)  # with another worker
        return result

    def _run(
        self, job: bytes, stdin: bytes, limits: Limits, host_call: HostCall | None
    ) -> RunResult:
        try:
            exchange, give_back = self._begin(job, limits, stdin)
        except WorkerError as problem:
            return RunResult("failed", detail=str(problem))
        malformed = ""
        try:
            while (message := exchange.next_message()) is not None:
                exchange.send(answer_host_call(message, host_call))
        except wire.WireError as problem:
            malformed = f"a malformed message: {problem}"
        finally:
            exchange.close()
            give_back()
        stdout, stderr = (kept.decode("utf-8", "replace") for kept in exchange.output)
        status, exit_code, detail = conclude(exchange.ending, limits)
        if malformed and status in ("ok", "killed"):
            status, exit_code, detail = "error", None, malformed
        elif status == "error" and stderr.strip():
            detail = stderr.strip().splitlines()[-1][:MAX_DETAIL]
        return RunResult(
            status=status,
            stdout=stdout,
            stderr=stderr,
            truncated=exchange.truncated,
            exit_code=exit_code,
            detail=detail,
            wall_seconds=exchange.ending.wall_seconds,
        )

    def open(self, code: str, *, limits: Limits | None = None) -> LocalSession:
        """Execute `code` as the module `solution` and keep it for calls. See `Executor.open`."""
        limits = limits or self._limits
        try:
            job = wire.frame({"code": code, "serve": True})
            exchange, give_back = self._begin(job, limits, None)
        except wire.WireError as problem:
            return LocalSession(Value("error", detail=f"the code: {problem}"), limits, bool)
        except WorkerError as problem:
            return LocalSession(Value("failed", detail=str(problem)), limits, bool)
        return LocalSession(exchange, limits, give_back)

    def _begin(
        self, job: bytes, limits: Limits, stdin: bytes | None
    ) -> tuple[Exchange, Callable[[], None]]:
        """Begin a run on a free worker. The function that is returned gives the worker back."""
        pool = self._started_pool()
        worker, thread = pool.take()
        exchange = None

        def give_back() -> None:
            is_well = exchange is not None and not (exchange.ending and exchange.ending.failed)
            pool.give_back(worker, thread, usable=is_well and worker.tier != ONE_RUN_TIER)

        try:
            exchange = Exchange(worker, job, limits, stdin=stdin)
        except OSError as problem:  # out of descriptors
            give_back()
            raise WorkerError(f"no pipes for the run: {problem}") from None
        return exchange, give_back

    def _started_pool(self) -> Pool:
        with self._starting:
            if self._pool is None:
                # Not a method of self: the pool would keep its sandbox from being collected.
                start_worker = partial(
                    Worker,
                    allow_subprocess=self._allow_subprocess,
                    scratch_bytes=self._limits.scratch_bytes,
                )
                if not self._description:
                    self._description = find_tier(
                        self._wanted_tier, start_worker, self._allow_subprocess, self._limits
                    )
                tier = self._description["tier"]
                if tier == "none":
                    logger.warning(NO_ISOLATION)
                self._pool = Pool(partial(start_worker, tier), self._num_workers)
                self._finalizer = weakref.finalize(self, self._pool.close)
            return self._pool

    def close(self) -> None:
        """End the workers. The sandbox starts again at its next use."""
        with self._starting:
            if self._finalizer is not None:
                self._finalizer()
            self._pool = self._finalizer = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _after_fork(self) -> None:
        """In a forked process, leave the workers to the parent and start new ones when needed."""
        if self._finalizer is not None:
            self._finalizer.detach()
        if self._pool is not None:
            self._pool.forget()
        self._reset()


class Pool:
    """The workers of one process. At most `size` threads have a worker at a time; others wait.

    A thread that has one already, by an open session or inside a `host_call`, gets more at once. If
    it had to wait, threads that each hold one worker and want a second would wait for ever.
    """

    def __init__(self, start_worker: Callable[[], Worker], size: int) -> None:
        self._start_worker = start_worker
        self._size = size
        self._changed = threading.Condition()
        self._idle: list[Worker] = []
        self._held_by: Counter[int] = Counter()
        self._is_closed = False

    def take(self) -> tuple[Worker, int]:
        """Return a worker and the thread that it counts for. WorkerError if none can be started."""
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(
                lambda: self._held_by[thread] or len(+self._held_by) < self._size
            )
            self._held_by[thread] += 1
            worker = self._pop_idle()
        try:
            return worker or self._start_worker(), thread
        except BaseException:
            self._release(thread)
            raise

    def _pop_idle(self) -> Worker | None:
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive():
                return worker
            worker.close()
        return None

    def give_back(self, worker: Worker, thread: int, *, usable: bool) -> None:
        """Give back what `take` returned. A worker that is not usable is ended."""
        with self._changed:
            keep = usable and not self._is_closed and len(self._idle) < self._size
            if keep:
                self._idle.append(worker)
        if not keep:
            worker.close()
        self._release(thread)

    def _release(self, thread: int) -> None:
        with self._changed:
            self._held_by[thread] -= 1
            self._held_by += Counter()  # drops the threads that hold none
            self._changed.notify_all()

    def close(self) -> None:
        """End the idle workers now, and the others when they are given back."""
        with self._changed:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def forget(self) -> None:
        """In a forked process, release the parent's workers without ending them."""
        for worker in self._idle:
            worker.forget()


def count_processors() -> int:
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def answer_host_call(
    message: tuple[PlainData, ...], host_call: HostCall | None
) -> tuple[str, PlainData]:
    """Do a run's `host_call` and return the answer for it: ("value", data) or ("raised", text)."""
    if host_call is None or len(message) != 2 or message[0] != "host_call":
        raise wire.WireError("a message that is not a host_call")
    try:
        answer = ("value", host_call(message[1]))
        wire.encode(answer)
    except Exception as problem:
        return "raised", f"{type(problem).__name__}: {problem}"[:MAX_DETAIL]
    return answer


def _after_fork_in_child() -> None:
    for sandbox in list(_SANDBOXES):
        sandbox._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
