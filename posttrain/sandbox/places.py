"""Where one run happens: what is private to it, how it is killed, what is cleared away after it.

Runs inside a worker. `fork`, `kill` and `end` are called by the worker, `enter` by the run's own
process while it is still trusted.
"""

from __future__ import annotations

import contextlib
import os
import signal

from posttrain.sandbox import isolation, kernel

SCRATCH_FILES = 4096


class Plain:
    """One process that cannot fork, in a folder that is there: killing it ends the run."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.parent = os.getpid()  # as the run's process sees it

    def fork(self) -> int:
        """`os.fork`, into this place."""
        return os.fork()

    def enter(self, scratch_bytes: int) -> None:  # noqa: ARG002
        """Go to the run's folder."""
        os.chdir(self.folder)

    def kill(self, process: int) -> None:
        """End the run before its time."""
        os.kill(process, signal.SIGKILL)

    def end(self) -> None:
        """Clear away what the run left, once its own process has ended or could not start."""


class OwnNamespace(Plain):
    """A process namespace and a scratch of its own. Whatever it forked ends with it."""

    def __init__(self) -> None:
        super().__init__(isolation.SCRATCH)
        self.parent = 0  # a parent outside of the namespace has no number
        self._first_process = kernel.start_first_process()

    def fork(self) -> int:
        """Fork into the namespace; later children of this process are in its own again."""
        process = -1
        # The first process shares this one's memory, and who is to be joined has to be open.
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
        """Mount an empty folder that is gone with the last process that sees it."""
        kernel.unshare(kernel.NEW_MOUNTS)
        options = f"size={scratch_bytes},nr_inodes={SCRATCH_FILES},mode=0700"
        kernel.mount("tmpfs", self.folder, "tmpfs", kernel.NOSUID | kernel.NODEV, options)
        os.chdir(self.folder)

    def end(self) -> None:
        """Kill the first process, and by that all others. Returns when they are gone."""
        os.kill(self._first_process, signal.SIGKILL)
        os.waitpid(self._first_process, 0)


def _fork_into_namespace_of(process: int) -> None:
    pidfd = kernel.open_process(process)
    try:
        kernel.enter_namespaces_of(pidfd, kernel.NEW_PIDS)
    finally:
        os.close(pidfd)


class Unconfined(Plain):
    """A temporary folder and a process group, which a run without isolation may leave."""

    def __init__(self) -> None:
        import tempfile  # with `shutil` below large, and of no use in the other places

        super().__init__(tempfile.mkdtemp())
        self._group = 0

    def fork(self) -> int:
        """Fork, and remember the child: its process id is its group's id as well."""
        self._group = os.fork()
        return self._group

    def kill(self, process: int) -> None:
        """Kill the process and its group."""
        super().kill(process)
        self._kill_group()

    def end(self) -> None:
        """Kill what is left of the group and remove the folder."""
        import shutil

        self._kill_group()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._group:
                os.killpg(self._group, signal.SIGKILL)
