"""The place of one run: what is private to it, how it is killed, and what is removed after it.

Runs inside a worker. The worker calls `fork`, `kill` and `end`; the run's own process calls `enter`
while it is still trusted. The places differ by tier, and share the methods of `Plain`.
"""

from __future__ import annotations

import contextlib
import os
import signal

from posttrain.sandbox.inside import isolation, kernel

SCRATCH_FILES = 4096


class Plain:
    """A place for one process that cannot fork, in an existing folder: killing it ends the run."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.parent = os.getpid()  # as the run's process sees it

    def fork(self) -> int:
        """Fork into this place, with the result of `os.fork`."""
        return os.fork()

    def enter(self, scratch_bytes: int) -> None:  # noqa: ARG002
        """Change to the run's folder."""
        os.chdir(self.folder)

    def kill(self, process: int) -> None:
        """End the run before its time."""
        os.kill(process, signal.SIGKILL)

    def end(self) -> None:
        """Remove what the run left, once its own process has ended or could not start."""


class OwnNamespace(Plain):
    """A place with a private process namespace and scratch folder. All that the run forked ends."""

    def __init__(self) -> None:
        super().__init__(isolation.SCRATCH)
        self.parent = 0  # a parent outside of the namespace has no number
        self._first_process = kernel.start_first_process()

    def fork(self) -> int:
        """Fork into the namespace. Later children of this process are in its own one again."""
        process = -1
        # Only a dumpable process can be joined, and the first one shares our memory and our flag.
        kernel.set_dumpable(True)
        try:
            _fork_into_namespace_of(self._first_process)
            kernel.set_dumpable(False)
            process = os.fork()
        finally:
            if process:
                _fork_into_namespace_of(os.getpid())
        return process

    def enter(self, scratch_bytes: int) -> None:
        """Mount an empty scratch folder, which vanishes with the last process that sees it."""
        kernel.unshare(kernel.NEW_MOUNTS)
        options = f"size={scratch_bytes},nr_inodes={SCRATCH_FILES},mode=0700"
        kernel.mount("tmpfs", self.folder, "tmpfs", kernel.NOSUID | kernel.NODEV, options)
        os.chdir(self.folder)

    def end(self) -> None:
        """Kill the first process, and with it all others; return when they are gone."""
        os.kill(self._first_process, signal.SIGKILL)
        os.waitpid(self._first_process, 0)


def _fork_into_namespace_of(process: int) -> None:
    pidfd = kernel.open_process(process)
    try:
        kernel.enter_namespaces_of(pidfd, kernel.NEW_PIDS)
    finally:
        os.close(pidfd)


class Unconfined(Plain):
    """A temporary folder and a process group. A run without isolation may leave both."""

    def __init__(self) -> None:
        import tempfile  # with `shutil` below large, and of no use in the other places

        super().__init__(tempfile.mkdtemp())
        self._group = 0

    def fork(self) -> int:
        """Fork and remember the child, whose process id is also the id of its group."""
        self._group = os.fork()
        return self._group

    def kill(self, process: int) -> None:
        """Kill the process and its group."""
        super().kill(process)
        self._kill_group()

    def end(self) -> None:
        """Kill the rest of the group and remove the folder."""
        import shutil

        self._kill_group()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._group:
                os.killpg(self._group, signal.SIGKILL)
