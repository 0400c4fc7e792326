"""Worker processes that can be killed, for a function of ours on input that may hang or crash it.

    pool = WorkerPool("posttrain.maths.algebra_worker:equal_pairs", memory_bytes=2 << 30)
    pool.call(request, timeout_seconds=3)        # Reply(value=…, problem="", detail="")

A pool starts one template process, a fresh interpreter that imports the target once, and the
template forks the workers. So a kill costs some milliseconds instead of an import, workers inherit
no CUDA context, lock or thread of the caller, and the caller's `__main__` is not run again. This
needs `os.fork`.

`call` uses no signal, so it works in any thread and below any event loop. Requests are pickled;
replies are JSON, because a worker is not trusted. Workers see no terminal and no Ctrl-C, and end
with the process that uses them, however that one ends.

The target's module may have a function `warm_up`, which is called once before the first fork.
`worker_main` is the code of the template and its workers.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import weakref
from typing import NamedTuple, TypeAlias, TypedDict

from posttrain.workers.worker_main import receive_frame, send_frame, wait_readable

MIN_SECONDS_AFTER_START = 1.0  # left to a first call whose time was spent on the start
SIBLINGS_VARIABLE = "POSTTRAIN_POOL_WORKERS"  # tells a worker the size of its pool
CONTROL_SECONDS = 10.0  # a template that takes longer for a fork or a kill is replaced

_BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[5:]; "
    "from posttrain.workers.worker_main import template; template(*sys.argv[1:5])"
)


Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"


class Settings(TypedDict):
    """The settings of a pool: see `WorkerPool`."""

    num_workers: int
    memory_bytes: int | None
    recycle_after: int
    start_seconds: float
    shows_output: bool


class Reply(NamedTuple):
    """The function's value, or the problem that leaves none.

    `problem`: "" for none, "timeout", "crashed" (the worker died), "raised" (the function raised)
    or "not started". `detail` says more.
    """

    value: Json
    problem: str = ""
    detail: str = ""


class _Lost(Exception):
    """The other process is gone, or has left the protocol."""


class _Template:
    """The process that forks workers. Its lock makes sure that it serves one command at a time."""

    def __init__(self, target: str, settings: Settings) -> None:
        ours, theirs = socket.socketpair()
        start_seconds = settings["start_seconds"]
        numbers = [settings["memory_bytes"] or 0, theirs.fileno(), os.getpid()]
        arguments = [target, *map(str, numbers), *sys.path]
        output = None if settings["shows_output"] else subprocess.DEVNULL
        self._socket = ours
        self._lock = threading.Lock()
        self._is_answering = False  # True after a command means that its answer was not read
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOTSTRAP, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, SIBLINGS_VARIABLE: str(settings["num_workers"])},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            started = json.loads(receive_frame(ours, time.monotonic() + start_seconds))
        except (OSError, EOFError, ValueError) as error:
            self.close()
            raise _Lost(f"no worker after {start_seconds:g} seconds ({error!r})") from error
        except BaseException:
            self.close()
            raise
        if started:
            self.close()
            raise _Lost(started)

    def fork(self) -> tuple[int, socket.socket]:
        """Fork a worker; return its process id and our end of its socket."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                return self._command("fork", theirs), ours
        except BaseException:
            ours.close()
            raise

    def kill(self, pid: int) -> None:
        """End a worker and wait until it is gone.

        The template does it as the parent, so the id cannot belong to another process by then.
        """
        with contextlib.suppress(_Lost):  # then the worker has gone with its template
            self._command(f"kill {pid}")

    def close(self) -> None:
        """End the template, and with it its workers."""
        with self._lock, contextlib.suppress(OSError):  # it may have ended or be closed already
            # This tells the template to end even if another process has a copy of the socket.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._process.wait(CONTROL_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """Release the template in a forked process, which is not its parent, without ending it."""
        self._socket.close()
        self._process.returncode = 0

    def _command(self, words: str, passed: socket.socket | None = None) -> int:
        with self._lock:
            if self._is_answering:
                raise _Lost("the template was left in the middle of a command")
            self._is_answering = True
            try:
                self._socket.settimeout(CONTROL_SECONDS)
                fds = [passed.fileno()] if passed else []
                socket.send_fds(self._socket, [words.encode().ljust(32)], fds)
                answer = int(receive_frame(self._socket, time.monotonic() + CONTROL_SECONDS))
            except (OSError, EOFError, ValueError) as error:
                raise _Lost(f"the template is gone ({error!r})") from error
            self._is_answering = False
            return answer


class _Worker:
    """One forked worker process, for one request at a time."""

    def __init__(self, template: _Template) -> None:
        self.num_served = 0
        self._template = template
        self._pid, self._socket = template.fork()

    def is_waiting(self) -> bool:
        """Tell whether the worker still waits; its socket reads as ended if it has died since."""
        return not wait_readable([self._socket], timeout_seconds=0)

    def ask(self, request: bytes, deadline: float) -> Reply:
        """Send a request and wait for the reply. TimeoutError past the deadline."""
        send_frame(self._socket, request, deadline)
        answer = json.loads(receive_frame(self._socket, deadline))
        self.num_served += 1
        return Reply(answer["value"], answer["problem"], answer["detail"])

    def end(self) -> None:
        """Kill the process and wait until it is gone."""
        self._socket.close()
        self._template.kill(self._pid)

    def forget(self) -> None:
        """Release the worker in a forked process, without ending it."""
        self._socket.close()


class _Slot:
    """A place for one worker. It belongs to the thread that holds the lock.

    This is a plain lock, taken by `with`: a thread can be stopped at any instruction (see
    `deadline`), and nothing else is certain to be released. `is_busy` then shows that a worker was
    left in the middle of a request, and the next thread ends it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: _Worker | None = None
        self.is_busy = False

    def end_worker(self) -> None:
        """End the worker, if there is one, and leave the slot empty."""
        if self.worker:
            self.worker.end()
        self.worker, self.is_busy = None, False


class WorkerPool:
    """Worker processes that run one function of ours and can be killed.

    Nothing starts before the first call. A pool that is pickled or forked into another process
    starts workers of its own there. After `close`, the next call starts it again.

    Args:
        target: The function, as "module:function". It takes one argument and returns JSON data.
        num_workers: Largest number of calls at a time; further calls wait for a free worker.
        memory_bytes: Address space of each worker beyond that of the imports; None is no limit.
        recycle_after: Number of requests after which a fresh worker replaces one.
        start_seconds: Time that the first call waits for the template.
        shows_output: Workers print where this process prints; otherwise their output is discarded.
    """

    def __init__(
        self,
        target: str,
        *,
        num_workers: int = 2,
        memory_bytes: int | None = None,
        recycle_after: int = 1000,
        start_seconds: float = 60.0,
        shows_output: bool = False,
    ) -> None:
        self._settings: Settings = {
            "num_workers": num_workers,
            "memory_bytes": memory_bytes,
            "recycle_after": recycle_after,
            "start_seconds": start_seconds,
            "shows_output": shows_output,
        }
        self._target = target
        self._begin()

    def call(self, request: object, *, timeout_seconds: float) -> Reply:
        """Have a worker call the function. Blocks; any thread may call.

        The time counts from when a worker is free, and includes its start, but leaves a first call
        at least `MIN_SECONDS_AFTER_START`.

        Args:
            request: The function's argument; it is pickled.
            timeout_seconds: Time after which the worker is killed.
        """
        if not hasattr(os, "fork"):
            return Reply(None, "not started", "this system has no os.fork")
        message = pickle.dumps(request)
        slot = next((s for s in self._slots if not s.lock.locked()), None)
        slot = slot or self._slots[next(self._turns) % len(self._slots)]
        with slot.lock:
            start = time.monotonic()
            try:
                self._prepare(slot)
            except (_Lost, OSError) as error:
                return Reply(None, "not started", str(error))
            deadline = start + timeout_seconds
            least = min(timeout_seconds, MIN_SECONDS_AFTER_START)
            return self._ask(slot, message, max(deadline, time.monotonic() + least))

    def close(self) -> None:
        """End all processes. Calls in progress lose their worker."""
        with self._lock:
            template, self._template = self._template, None
        if template:
            template.close()
        for slot in self._slots:
            with slot.lock:
                slot.end_worker()

    def _begin(self) -> None:
        """Set the state of a pool without processes."""
        self._lock = threading.Lock()
        self._slots = [_Slot() for _ in range(self._settings["num_workers"])]
        self._turns = itertools.count()
        self._template: _Template | None = None
        _pools.add(self)

    def _forget(self) -> None:
        """In a forked process, release the parent's workers, which are not ours to use or end."""
        for slot in self._slots:
            if slot.worker:
                slot.worker.forget()
        if self._template:
            self._template.forget()
        self._begin()

    def _prepare(self, slot: _Slot) -> None:
        """Make sure that the slot has a worker that waits for a request."""
        if slot.worker and not slot.is_busy and slot.worker.is_waiting():
            return
        slot.end_worker()
        with self._lock:
            template = self._running_template()
            try:
                slot.worker = _Worker(template)
            except _Lost:  # it was killed, or left in a command, since the last call
                self._template = None
                template.close()
                slot.worker = _Worker(self._running_template())

    def _running_template(self) -> _Template:
        if self._template is None:
            self._template = _Template(self._target, self._settings)
        return self._template

    def _ask(self, slot: _Slot, message: bytes, deadline: float) -> Reply:
        slot.is_busy = True
        try:
            reply = slot.worker.ask(message, deadline)
            slot.is_busy = slot.worker.num_served >= self._settings["recycle_after"]
            return reply
        except TimeoutError:
            return Reply(None, "timeout", "no reply in time")
        except (OSError, EOFError, ValueError, KeyError) as error:
            return Reply(None, "crashed", f"the worker process died ({error!r})")
        finally:
            if slot.is_busy:
                slot.end_worker()

    def __getstate__(self) -> dict[str, object]:
        return {"_target": self._target, "_settings": self._settings}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit our modules may be gone
            self.close()


_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(_pools):
        pool.close()


def _forget_all() -> None:
    for pool in list(_pools):
        pool._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
