"""The worker: a small clean Python that forks for each run. Started and fed by `worker.Worker`.

It reads its setup and jobs from a control socket, shuts itself in, loads the common parts of the
standard library once, and then for each job forks a process, watches its time, and answers with how
it ended. The job carries limits and descriptors only: code and input go through descriptors that
only the forked process reads, so nothing of a run stays in the memory that the next one inherits.

It ends when the control socket closes or the caller's process ends, whatever kills that.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import socket
import sys
import time
from typing import Any, NoReturn

from posttrain.sandbox import isolation, kernel, places, program, seccomp

# What programs import most. Each costs every run a little, as memory that is forked.
COMMON_MODULES = """
    abc array bisect cmath collections collections.abc contextlib copy dataclasses datetime decimal
    enum fractions functools heapq io itertools json math numbers operator random re statistics
    string struct time typing
"""
JOB_BYTES = 1 << 16


def main(control: socket.socket, setup: dict[str, Any]) -> NoReturn:
    """Prepare, say so, serve. Never returns."""
    try:
        worker = Zygote(control, setup)
    except OSError as problem:
        control.send(json.dumps({"failed": str(problem)}).encode())
        os._exit(1)
    control.send(json.dumps({"ready": True, "notes": worker.notes}).encode())
    worker.serve()


class Zygote:
    """A worker's state: the tier, the line to the caller, and how to notice the caller's end."""

    def __init__(self, control: socket.socket, setup: dict[str, Any]) -> None:
        self.control = control
        self.tier: str = setup["tier"]
        self.allow_subprocess: bool = setup["allow_subprocess"]
        self.caller_pidfd: int = setup["caller_pidfd"]
        os.umask(0o022)
        os.environ.clear()  # Python itself sets LC_CTYPE
        kernel.reset_signals()  # first processes must have no handler
        for name in COMMON_MODULES.split():
            importlib.import_module(name)
        kernel.use_one_malloc_arena()
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # out of memory, the kernel ends a run before the training
        began_as = os.getuid()
        user = self._shut_in()
        # Elsewhere the kernel counts the tasks of this user that are none of ours as well.
        self.counts_tasks = self.tier in ("namespaces", "bubblewrap") or user != began_as
        self.notes = {"user": user}
        for name in [name for name in sys.modules if name.partition(".")[0] == "posttrain"]:
            del sys.modules[name]  # no business of the code's
        self._filter = self._build_filter()
        gc.collect()
        gc.freeze()  # so that no collection in a fork touches what it shares with this process

    def _shut_in(self) -> int:
        """Enter the tier. The user id that the machine's files and processes see from then on."""
        user = os.getuid()
        if self.tier == "namespaces":
            user = isolation.enter_namespaces()
        elif self.tier == "landlock":
            user = isolation.enter_landlock()
        if self.tier != "none":
            kernel.set_dumpable(False)  # closes its memory to other processes of the same user
        return user

    def serve(self) -> NoReturn:
        """Do one job after the other until the caller is gone."""
        while True:
            self._wait([self.control.fileno()], None)
            data, descriptors, _, _ = socket.recv_fds(self.control, JOB_BYTES, 4)
            if not data:
                os._exit(0)
            if descriptors:  # else it is a stop for a run that has just ended
                self.control.send(json.dumps(self._do(json.loads(data), descriptors)).encode())

    def _wait(self, descriptors: list[int], seconds: float | None) -> list[int]:
        """Those that became readable in time. Ends the worker when the caller has ended."""
        poll = select.poll()
        for descriptor in [self.caller_pidfd, *descriptors]:
            poll.register(descriptor, select.POLLIN)
        timeout = None if seconds is None else max(0.0, seconds * 1000)
        ready = [descriptor for descriptor, _ in poll.poll(timeout)]
        if self.caller_pidfd in ready:
            os._exit(0)
        return ready

    def _do(self, job: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Run one job to its end, and say how it ended."""
        began = time.monotonic()
        started, status_pipe = os.pipe()
        place = None
        try:
            place = self._make_place()
            process = self._fork(job, [*descriptors, status_pipe], place)
        except OSError as problem:
            process = None
            ending = {"failed": f"no process for the run: {problem}"}
        for descriptor in [*descriptors, status_pipe]:
            os.close(descriptor)
        if process:
            stopped = self._watch(process, place, began + job["wall_seconds"])
            _, status, usage = os.wait4(process, 0)
            ending = {"status": status, "cpu": usage.ru_utime + usage.ru_stime, "stopped": stopped}
            if not stopped and os.read(started, 1) != program.STARTED:
                ending = {"failed": "the run could not be confined"}
        if place:
            place.end()
        os.close(started)
        return {**ending, "wall": time.monotonic() - began}

    def _make_place(self) -> places.Plain:
        if self.tier == "namespaces":
            return places.OwnNamespace()
        if self.tier == "none":
            return places.Unconfined()
        return places.Plain("/" if self.tier == "landlock" else isolation.SCRATCH)

    def _fork(self, job: dict[str, Any], descriptors: list[int], place: places.Plain) -> int:
        """Fork the run's process and return its id."""
        process = place.fork()
        if process:
            return process
        try:
            place.enter(job["scratch_bytes"])
            program.start(descriptors, self._limits(job), self._filter, place.parent)
        finally:
            os._exit(1)

    def _limits(self, job: dict[str, Any]) -> dict[str, Any]:
        tasks = job["max_processes"] if self.allow_subprocess else program.MAX_THREADS
        return {
            **job,
            "tasks": tasks if self.counts_tasks else 0,
            "scratch_bytes": 0 if self.tier == "landlock" else job["scratch_bytes"],
        }

    def _build_filter(self) -> seccomp.FilterProgram | None:
        if self.tier == "none":
            return None
        in_sight = self.tier == "landlock"  # the machine's files and processes
        lines = seccomp.build_filter(
            kernel.MACHINE,
            allow_subprocess=self.allow_subprocess,
            writable=not in_sight,
            signals_to_itself_only=in_sight,
            refuse_truncation=in_sight and kernel.landlock_version() < 3,
        )
        return seccomp.pack(lines)

    def _watch(self, process: int, place: places.Plain, deadline: float) -> str:
        """Wait for a run's end, or end it when it is due. Who ended it: "", "wall" or "asked"."""
        pidfd = kernel.open_process(process)
        ready = self._wait([pidfd, self.control.fileno()], deadline - time.monotonic())
        os.close(pidfd)
        if pidfd in ready:
            return ""
        place.kill(process)
        if not ready:
            return "wall"
        if not self.control.recv(JOB_BYTES):
            os._exit(0)
        return "asked"
