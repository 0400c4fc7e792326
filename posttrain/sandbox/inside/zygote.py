"""The worker process: a small, clean Python that forks for each run. `worker.Worker` starts it.

It reads its setup from a control socket, loads the common parts of the standard library and
confines itself. Then, for each job, it forks a process, watches its time, and reports how it ended.
A job carries limits and descriptors only. Code and input go through descriptors that only the
forked process reads, so that nothing of a run stays in the memory that the next one inherits.

It ends when the control socket closes or the caller's process ends, for whatever reason.
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
from dataclasses import asdict, replace
from typing import NoReturn

from posttrain.sandbox.inside import isolation, kernel, places, program, seccomp
from posttrain.sandbox.wire import Ending, RunSettings, Setup

# The modules that programs import most. Each costs every run a little: more memory to fork.
COMMON_MODULES = """
    abc array bisect cmath collections collections.abc contextlib copy dataclasses datetime decimal
    enum fractions functools heapq io itertools json math numbers operator random re statistics
    string struct time typing
"""
JOB_BYTES = 1 << 16


def main(control: socket.socket, setup: Setup) -> NoReturn:
    """Prepare a worker, report that it is ready, and serve. Never returns."""
    try:
        worker = Zygote(control, setup)
    except OSError as problem:
        control.send(json.dumps({"failed": str(problem)}).encode())
        os._exit(1)
    control.send(json.dumps({"ready": True, "notes": worker.notes}).encode())
    worker.serve()


class Zygote:
    """The state of a worker: its tier, its control socket, and the pidfd of its caller."""

    def __init__(self, control: socket.socket, setup: Setup) -> None:
        self.control = control
        self.tier = setup["tier"]
        self.allow_subprocess = setup["allow_subprocess"]
        self.caller_pidfd = setup["caller_pidfd"]
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
        # Elsewhere the kernel would also count tasks of this user that are not ours.
        self.counts_tasks = self.tier in ("namespaces", "bubblewrap") or user != began_as
        self.notes = {"user": user}
        for name in [name for name in sys.modules if name.partition(".")[0] == "posttrain"]:
            del sys.modules[name]  # the code has no use for them
        self._filter = self._build_filter()
        gc.collect()
        gc.freeze()  # so that no collection in a fork touches what it shares with this process

    def _shut_in(self) -> int:
        """Enter the tier, and return the user id that the rest of the machine sees from then on."""
        user = os.getuid()
        if self.tier == "namespaces":
            user = isolation.enter_namespaces()
        elif self.tier == "landlock":
            user = isolation.enter_landlock()
        if self.tier != "none":
            kernel.set_dumpable(False)  # hides its memory from other processes of the same user
        return user

    def serve(self) -> NoReturn:
        """Do one job after another until the caller is gone."""
        while True:
            self._wait([self.control.fileno()], None)
            data, descriptors, _, _ = socket.recv_fds(self.control, JOB_BYTES, 4)
            if not data:
                os._exit(0)
            if descriptors:  # otherwise it is a stop for a run that has just ended
                ending = self._do(RunSettings(**json.loads(data)), descriptors)
                self.control.send(json.dumps(asdict(ending)).encode())

    def _wait(self, descriptors: list[int], seconds: float | None) -> list[int]:
        """Return the descriptors that became readable in time. Exits when the caller has ended."""
        poll = select.poll()
        for descriptor in [self.caller_pidfd, *descriptors]:
            poll.register(descriptor, select.POLLIN)
        timeout = None if seconds is None else max(0.0, seconds * 1000)
        ready = [descriptor for descriptor, _ in poll.poll(timeout)]
        if self.caller_pidfd in ready:
            os._exit(0)
        return ready

    def _do(self, settings: RunSettings, descriptors: list[int]) -> Ending:
        """Run one job to its end."""
        began = time.monotonic()
        started, status_pipe = os.pipe()
        place = None
        try:
            place = self._make_place()
            process = self._fork(settings, [*descriptors, status_pipe], place)
        except OSError as problem:
            process = None
            ending = Ending(failed=f"no process for the run: {problem}")
        for descriptor in [*descriptors, status_pipe]:
            os.close(descriptor)
        if process:
            stopped = self._watch(process, place, began + settings.wall_seconds)
            _, status, usage = os.wait4(process, 0)
            cpu_seconds = usage.ru_utime + usage.ru_stime
            ending = Ending(status=status, cpu_seconds=cpu_seconds, stopped=stopped)
            if not stopped and os.read(started, 1) != program.STARTED:
                ending = Ending(failed="the run could not be confined")
        if place:
            place.end()
        os.close(started)
        return replace(ending, wall_seconds=time.monotonic() - began)

    def _make_place(self) -> places.Plain:
        if self.tier == "namespaces":
            return places.OwnNamespace()
        if self.tier == "none":
            return places.Unconfined()
        return places.Plain("/" if self.tier == "landlock" else isolation.SCRATCH)

    def _fork(self, settings: RunSettings, descriptors: list[int], place: places.Plain) -> int:
        """Fork the run's process and return its id."""
        process = place.fork()
        if process:
            return process
        try:
            place.enter(settings.scratch_bytes)
            program.start(descriptors, self._for_tier(settings), self._filter, place.parent)
        finally:
            os._exit(1)

    def _for_tier(self, settings: RunSettings) -> RunSettings:
        """Return the settings with what this tier decides: tasks, and room for files."""
        tasks = settings.max_processes if self.allow_subprocess else program.MAX_THREADS
        return replace(
            settings,
            max_tasks=tasks if self.counts_tasks else 0,
            scratch_bytes=0 if self.tier == "landlock" else settings.scratch_bytes,
        )

    def _build_filter(self) -> seccomp.FilterProgram | None:
        if self.tier == "none":
            return None
        in_sight = self.tier == "landlock"  # are the machine's files and processes visible?
        lines = seccomp.build_filter(
            kernel.MACHINE,
            allow_subprocess=self.allow_subprocess,
            writable=not in_sight,
            signals_to_itself_only=in_sight,
            refuse_truncation=in_sight and kernel.landlock_version() < 3,
        )
        return seccomp.pack(lines)

    def _watch(self, process: int, place: places.Plain, deadline: float) -> str:
        """Wait for a run's end, or end it at its deadline. Returns `Ending.stopped`."""
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
