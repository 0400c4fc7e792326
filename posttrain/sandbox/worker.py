"""A worker, seen from the caller: a small Python process that forks for each run.

    worker = Worker("namespaces", allow_subprocess=False)   # WorkerError says why it cannot start
    worker.start_run(job, descriptors)                      # ...
    worker.read_ending()                                    # how the run ended

A worker is executed afresh, never forked from the caller, so it inherits neither memory,
environment, threads nor CUDA state. Its source is `wire` and the modules of `sandbox/inside`, sent
over the control socket, so it needs no file of ours.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from posttrain.sandbox.inside import isolation, kernel
from posttrain.sandbox.wire import Ending, PlainData, RunSettings, Setup

START_SECONDS = 30.0  # a loaded machine; usually a tenth of a second
STOP_SECONDS = 5.0
ONE_RUN_TIER = "bubblewrap"  # its worker is the namespace's first process and ends with the run
MESSAGE_BYTES = 1 << 16
# All modules that a worker runs, each after those that it imports.
SHARED_MODULE = "wire"
INSIDE = ("seccomp", "kernel", "isolation", "places", "program", "zygote")

# The packages are empty stand-ins, so that our `__init__` files do not run in the worker.
_BOOT = """
import json, socket, sys, types
control = socket.socket(fileno=int(sys.argv[1]))
setup = json.loads(control.recv(1 << 20))
for name, source in setup.pop("modules"):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, f"<{name}>", "exec", dont_inherit=True), vars(module))
sys.modules["posttrain.sandbox.inside.zygote"].main(control, setup)
"""


class WorkerError(RuntimeError):
    """A worker could not start, or has ended unexpectedly."""


class Worker:
    """One worker process, which does one run at a time.

    Args:
        tier: The isolation to start it in. WorkerError if that does not work here.
        allow_subprocess: Let runs fork and execute programs.
        scratch_bytes: Size of the scratch folder in the bubblewrap tier.
    """

    def __init__(self, tier: str, *, allow_subprocess: bool, scratch_bytes: int) -> None:
        self.tier = tier
        wrapper = _bubblewrap(scratch_bytes) if tier == "bubblewrap" else []
        try:
            caller_pidfd = kernel.open_process(os.getpid())
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as problem:
            raise WorkerError(f"cannot start a worker: {problem}") from None
        try:
            self.process = subprocess.Popen(
                [*wrapper, *_python(), "-c", _BOOT, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                pass_fds=(theirs.fileno(), caller_pidfd),
                start_new_session=True,  # a Ctrl-C is meant for the caller
            )
        except OSError as problem:
            self.control.close()
            raise WorkerError(f"cannot start a worker: {problem}") from None
        finally:
            theirs.close()
            os.close(caller_pidfd)
        self.notes = self._greet(caller_pidfd, allow_subprocess=allow_subprocess)

    def _greet(self, caller_pidfd: int, *, allow_subprocess: bool) -> dict[str, PlainData]:
        """Send the setup and the source; return the worker's notes on its isolation."""
        setup: Setup = {
            "tier": self.tier,
            "allow_subprocess": allow_subprocess,
            "caller_pidfd": caller_pidfd,
        }
        self.control.settimeout(START_SECONDS)
        try:
            self.control.send(json.dumps({**setup, "modules": _modules()}).encode())
            answer = json.loads(self.control.recv(MESSAGE_BYTES) or "{}")
        except OSError as problem:
            answer = {"failed": f"no answer from the worker: {problem}"}
        if "ready" not in answer:
            self.kill()
            raise WorkerError(answer.get("failed", "the worker ended while starting"))
        self.control.settimeout(STOP_SECONDS)
        return answer["notes"]

    def start_run(self, settings: RunSettings, descriptors: list[int]) -> None:
        """Begin a run. The descriptors are its stdin, stdout, stderr and channel."""
        try:
            socket.send_fds(self.control, [json.dumps(asdict(settings)).encode()], descriptors)
        except OSError:
            raise WorkerError("the worker has ended") from None

    def stop_run(self) -> None:
        """Ask the worker to end the run. `read_ending` then returns as for any other run."""
        try:
            self.control.send(b"stop")
        except OSError:
            raise WorkerError("the worker has ended") from None

    def read_ending(self) -> Ending:
        """Return how the run ended. Call it once the control socket is readable."""
        try:
            message = self.control.recv(MESSAGE_BYTES)
        except OSError:
            message = b""
        return Ending(**json.loads(message or b'{"failed": "the worker ended during a run"}'))

    def is_alive(self) -> bool:
        """Return False if something has killed the process."""
        return self.process.poll() is None

    def close(self) -> None:
        """End the worker and wait until it is gone."""
        self.control.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the worker by force. The kernel ends what it has started."""
        self.control.close()
        self.process.kill()
        self.process.wait()

    def forget(self) -> None:
        """Release the worker in a process forked from the caller's, without ending it."""
        self.control.close()
        self.process.returncode = 0  # not a child of this process, so there is nothing to wait for


def _python() -> list[str]:
    """Return the command for the bare interpreter: no site-packages, no environment variables."""
    return [
        getattr(sys, "_base_executable", "") or sys.executable,
        *["-I", "-S", "-B", "-X", "utf8"],
    ]


def _modules() -> list[tuple[str, str]]:
    """Return name and source of each module that a worker runs, in the order of loading."""
    folder = Path(__file__).parent
    stand_ins = ("posttrain", "posttrain.sandbox", "posttrain.sandbox.inside")
    files = {f"posttrain.sandbox.{SHARED_MODULE}": folder / f"{SHARED_MODULE}.py"}
    files |= {
        f"posttrain.sandbox.inside.{name}": folder / "inside" / f"{name}.py" for name in INSIDE
    }
    sources = [(name, path.read_text(encoding="utf-8")) for name, path in files.items()]
    return [*((name, "") for name in stand_ins), *sources]


def _bubblewrap(scratch_bytes: int) -> list[str]:
    """Return the command for bubblewrap, with the same file tree as `isolation.build_root`."""
    program = shutil.which("bwrap")
    if program is None:
        raise WorkerError("bubblewrap (bwrap) is not installed")
    shown = [text for path in isolation.readable_paths() for text in ("--ro-bind", path, path)]
    return [
        *(program, "--unshare-all", "--unshare-user", "--new-session"),
        *shown,
        *("--dev", "/dev", "--size", str(scratch_bytes), "--tmpfs", isolation.SCRATCH),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", isolation.SCRATCH, "--"),
    ]
