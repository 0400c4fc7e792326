"""What running untrusted code takes and gives: the types that every executor shares.

An executor runs code somewhere else and answers in plain data. `posttrain.sandbox.Sandbox` does it
on this machine; anything with the two methods of `Executor`, such as a client of a remote service,
can be passed in its place.

Plain data: None, bool, int, float, complex, str, bytes, and list, tuple, set, frozenset and dict of
these, by exact type. Of other types only Counter, OrderedDict and defaultdict of `collections`
leave the sandbox, as the dict that they equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from posttrain.errors import PosttrainError

Status = Literal["ok", "error", "timeout", "memory", "killed", "failed"]


class SandboxUnavailableError(PosttrainError):
    """No isolation works on this machine: what failed, and how to enable it."""


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    Attributes:
        wall_seconds: Time from start to end, waiting included.
        cpu_seconds: Processor time, of all its threads together, rounded up to whole seconds.
        memory_bytes: Address space, of which Python itself takes about 30 MB.
        output_bytes: Kept of stdout and of stderr each; what comes after is dropped.
        scratch_bytes: Private files in its working folder, gone with the run.
        max_processes: Processes and threads with `allow_subprocess`, each of which has the other
            limits to itself; without, a run is one process.
    """

    wall_seconds: float = 6.0
    cpu_seconds: float = 5.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    scratch_bytes: int = 16 << 20
    max_processes: int = 32


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        status: "ok": to the end, with exit code 0. "error": an uncaught exception or another exit
            code. "timeout": wall or processor time. "memory": out of memory. "killed": by a signal,
            such as a crash or a call that is not allowed. "failed": our own failure; says nothing
            about the code.
        stdout, stderr: Decoded as UTF-8, bytes that are not replaced.
        truncated: Output was dropped.
        exit_code: None where a signal ended it.
        detail: One line on what happened, for people.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    truncated: bool = False
    exit_code: int | None = None
    detail: str = ""
    wall_seconds: float = 0.0


@dataclass(frozen=True)
class Value:
    """What a call or expression gave.

    Attributes:
        status: "ok": `data` holds plain data. "error": it raised, or gave something that is not
            plain data or too large. The other statuses as in `RunResult`: the session is over.
        detail: The exception in one line ("ValueError: …"), or how the session ended.
    """

    status: Status
    data: Any = None
    detail: str = ""


class Session(Protocol):
    """Code that was executed once as a module, waiting to be asked. Use it in a `with` block."""

    def call(
        self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Value:
        """Call the module's function `name` with plain data."""

    def evaluate(self, expression: str) -> Value:
        """Evaluate a Python expression in the module's namespace."""

    def __enter__(self) -> Session: ...

    def __exit__(self, *exc: object) -> None: ...


class Executor(Protocol):
    """Runs untrusted code. Safe to use from several threads at once."""

    def run(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        host_call: Callable[[Any], Any] | None = None,
    ) -> RunResult:
        """Run `code` as a program (`__name__ == "__main__"`).

        host_call: f(plain data) -> plain data, run out here each time the code calls the built-in
            `host_call(data)`. For code that is trusted with its answers, never for the code under
            test. An exception that it raises is raised inside as RuntimeError.
        """

    def open(self, code: str, *, limits: Limits | None = None) -> Session:
        """Execute `code` as a module and keep it for calls. The limits are for the whole session.

        `__name__` is "solution", so a main block does not run. What the code prints goes nowhere.
        Never raises for what the code does: each call's Value says how it went.
        """
