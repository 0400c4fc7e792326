"""The types that every executor of untrusted code shares: limits, results, sessions.

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
from typing import Literal, Protocol, TypeAlias

from posttrain.errors import PosttrainError
from posttrain.sandbox.wire import PlainData

Status = Literal["ok", "error", "timeout", "memory", "killed", "failed"]


class SandboxUnavailableError(PosttrainError):
    """No isolation works on this machine. The message says what failed, and how to enable it."""


@dataclass(frozen=True)
class Limits:
    """The resources that one run may use.

    Attributes:
        wall_seconds: Time from start to end, waiting included.
        cpu_seconds: Processor time of all threads together, rounded up to whole seconds.
        memory_bytes: Address space, of which Python itself takes about 30 MB.
        output_bytes: Bytes kept of stdout and of stderr each; further output is dropped.
        scratch_bytes: Size of the private files in the working folder, which vanish with the run.
        max_processes: Processes and threads with `allow_subprocess`. Each of them has the other
            limits to itself. Without `allow_subprocess`, a run is one process.
    """

    wall_seconds: float = 6.0
    cpu_seconds: float = 5.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    scratch_bytes: int = 16 << 20
    max_processes: int = 32


@dataclass(frozen=True)
class RunResult:
    """The end of a run, and its output.

    Attributes:
        status: "ok": it ran to its end, with exit code 0. "error": an uncaught exception or another
            exit code. "timeout": the limit on wall or processor time. "memory": out of memory.
            "killed": a signal ended it, as in a crash. "failed": our own failure, which says
            nothing about the code.
        stdout, stderr: The output decoded as UTF-8, with other bytes replaced.
        truncated: Whether output was dropped.
        exit_code: The exit code; None if a signal ended the run.
        detail: One line on what happened, for people.
        wall_seconds: Time from start to end.
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
    """The result of a call or expression.

    Attributes:
        status: "ok": `data` holds plain data. "error": it raised, or its result is not plain data
            or is too large. The other statuses are those of `RunResult`; the session is then over.
        data: The result; None unless the status is "ok".
        detail: The exception in one line ("ValueError: …"), or how the session ended.
    """

    status: Status
    data: PlainData = None
    detail: str = ""


HostCall: TypeAlias = "Callable[[PlainData], PlainData]"


class Session(Protocol):
    """Code that was executed once as a module and answers calls. Use it in a `with` block."""

    def call(
        self,
        name: str,
        args: Sequence[PlainData] = (),
        kwargs: Mapping[str, PlainData] | None = None,
    ) -> Value:
        """Call the module's function `name` with plain data."""

    def evaluate(self, expression: str) -> Value:
        """Evaluate a Python expression in the module's namespace."""

    def __enter__(self) -> Session: ...

    def __exit__(self, *exc: object) -> None: ...


class Executor(Protocol):
    """Anything that runs untrusted code. Safe to use from several threads at once."""

    def run(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        host_call: HostCall | None = None,
    ) -> RunResult:
        """Run `code` as a program (`__name__ == "__main__"`).

        Args:
            code: Python source.
            stdin: The program's input.
            limits: The limits of this run; by default those of the executor.
            host_call: f(plain data) -> plain data, called on our side each time the code calls the
                built-in `host_call(data)`. Only for code that is trusted with the answers, never
                for the code under test. Inside, its exceptions become RuntimeError.
        """

    def open(self, code: str, *, limits: Limits | None = None) -> Session:
        """Execute `code` as a module and keep it for calls. The limits are for the whole session.

        `__name__` is "solution", so a main block does not run. Output of the code is discarded.
        `open` never raises for what the code does: each call's Value says how it went.
        """
