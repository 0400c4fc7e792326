"""The workers of one process: who may use one, starting and ending them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from posttrain.sandbox.worker import Worker


class Pool:
    """At most `size` threads have a worker at a time; others wait.

    A thread that has one already, by an open session or inside a `host_call`, gets more at once:
    if it had to wait, threads that each hold one and want a second would wait for ever.
    """

    def __init__(self, start_worker: Callable[[], Worker], size: int) -> None:
        self._start_worker = start_worker
        self._size = size
        self._changed = threading.Condition()
        self._idle: list[Worker] = []
        self._held_by: Counter[int] = Counter()
        self._is_closed = False

    def take(self) -> tuple[Worker, int]:
        """A worker and the thread that it counts for. WorkerError when none can be started."""
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
        """Return what `take` gave."""
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
        """End the idle workers now and the others when they are given back."""
        with self._changed:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def forget(self) -> None:
        """In a forked process: let go of the parent's workers without ending them."""
        for worker in self._idle:
            worker.forget()
