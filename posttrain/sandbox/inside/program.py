"""The process of one run: it sets limits and the filter, and then executes the untrusted code.

Runs inside a worker's fork. Nothing here is a secret, and our side believes nothing that this
process says: the code can read and change all of it. What confines the code are the rules of the
kernel that `start` sets before it reads the first untrusted byte.
"""

from __future__ import annotations

import atexit
import builtins
import fcntl
import io
import linecache
import os
import resource
import signal
import sys
import threading
import traceback
import types
from functools import partial
from typing import NoReturn

from posttrain.sandbox import wire
from posttrain.sandbox.inside import kernel, seccomp
from posttrain.sandbox.wire import PlainData, RunSettings

CHANNEL, STATUS_PIPE = 3, 4
FILE_NAME = "solution.py"
STARTED = b"+"
EXIT_MEMORY = 113  # exit code of a process that ended with an uncaught MemoryError
MAX_THREADS = 64
OWN_PROCESSES = 3  # ours under the same user: a worker, its parent, a run's first process
STACK_BYTES = 64 << 20
MAX_FILES = 64
MAX_DETAIL = 300


def start(
    descriptors: list[int],
    settings: RunSettings,
    filter_program: seccomp.FilterProgram | None,
    parent: int,
) -> NoReturn:
    """Confine this process, then do the job that comes over the channel. Never returns.

    Args:
        descriptors: stdin, stdout, stderr, the channel and the status pipe. A byte on the status
            pipe tells a run that ended badly from one that could not be confined. The pipe is
            closed before the job is read, so that the code cannot write to it.
        settings: The limits of the run.
        filter_program: The seccomp filter; None without isolation.
        parent: Process id of the parent as this process sees it.
    """
    code = 1
    try:
        copies = [fcntl.fcntl(each, fcntl.F_DUPFD, len(descriptors)) for each in descriptors]
        for target, copy in enumerate(copies):  # 0, 1, 2, CHANNEL, STATUS_PIPE
            os.dup2(copy, target)
        os.closerange(len(descriptors), 1 << 20)
        os.setsid()
        set_limits(settings)
        kernel.drop_capabilities()
        kernel.forbid_new_privileges()
        kernel.die_with_parent(parent)
        if filter_program is not None:
            seccomp.set_process(filter_program, os.getpid())
            kernel.install_filter(filter_program)
        os.write(STATUS_PIPE, STARTED)
        os.close(STATUS_PIPE)
        code = do_job(receive())
    except MemoryError:
        code = EXIT_MEMORY
    finally:
        os._exit(code)


def set_limits(settings: RunSettings) -> None:
    """Set the resource limits of a run. None of them can be raised again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cpu = settings.cpu_seconds
    kernel.lower_limit(resource.RLIMIT_CPU, cpu, cpu + 1)  # SIGXCPU, and a second later SIGKILL
    kernel.lower_limit(resource.RLIMIT_AS, settings.memory_bytes)
    kernel.lower_limit(resource.RLIMIT_STACK, STACK_BYTES)
    kernel.lower_limit(resource.RLIMIT_FSIZE, settings.scratch_bytes)
    kernel.lower_limit(resource.RLIMIT_NOFILE, MAX_FILES)
    kernel.lower_limit(resource.RLIMIT_CORE, 0)
    kernel.lower_limit(resource.RLIMIT_MEMLOCK, 0)
    if settings.max_tasks:
        kernel.lower_limit(resource.RLIMIT_NPROC, settings.max_tasks + OWN_PROCESSES)


def receive() -> PlainData:
    """Read the next message of the channel. EOFError when the caller is gone."""
    header = _read(wire.HEADER.size)
    return wire.decode(_read(*wire.HEADER.unpack(header)))


def _read(count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = os.read(CHANNEL, count - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def send(message: PlainData) -> None:
    """Send one message to the caller."""
    data = memoryview(wire.frame(message))
    while data:
        data = data[os.write(CHANNEL, data) :]


def do_job(job: dict[str, PlainData]) -> int:
    """Run a program, or execute a module and serve calls of it; return the exit code."""
    open_standard_streams()
    name = "solution" if job["serve"] else "__main__"
    module = types.ModuleType(name)
    sys.modules["__main__"] = sys.modules[name] = module
    sys.argv[:] = [FILE_NAME]
    code = job["code"]
    linecache.cache[FILE_NAME] = (len(code), None, code.splitlines(True), FILE_NAME)
    if job["serve"]:
        return serve(code, vars(module))
    if job["host_call"]:
        builtins.host_call = HostCall()
    else:
        os.close(CHANNEL)
    return run_program(code, vars(module))


def open_standard_streams() -> None:
    """Open new text streams, because those of the worker may hold buffered text."""
    open_text = partial(open, encoding="utf-8", closefd=False)
    sys.stdin = sys.__stdin__ = open_text(0, errors="surrogateescape")
    sys.stdout = sys.__stdout__ = open_text(1, "w", errors="surrogateescape")
    sys.stderr = sys.__stderr__ = open_text(2, "w", buffering=1, errors="backslashreplace")


def run_program(code: str, namespace: dict[str, object]) -> int:
    """Execute the code as Python executes a script, exit handlers and threads included.

    Returns the exit code.
    """
    exit_code = 0
    try:
        exec(compile(code, FILE_NAME, "exec", dont_inherit=True), namespace)
    except BaseException as problem:
        exit_code = report(problem)
    try:
        threading._shutdown()  # waits for threads that are not daemons
        atexit._run_exitfuncs()
    except BaseException as problem:
        exit_code = report(problem)
    if not flush_streams(namespace):
        exit_code = exit_code or 120  # as Python itself
    return exit_code


def flush_streams(namespace: dict[str, object]) -> bool:
    """Flush the standard streams, and the streams that the code opened or kept in its namespace.

    Returns False if one of them could not be flushed.
    """
    own = [sys.__stdout__, sys.__stderr__]
    opened = [value for value in namespace.values() if isinstance(value, io.IOBase)]
    all_flushed = True
    for stream in [sys.stdout, sys.stderr, *own, *opened]:
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException:  # its class may be the code's own
            all_flushed = False
    return all_flushed


def report(problem: BaseException) -> int:
    """Print an uncaught exception as Python does, and return the exit code that it means."""
    if isinstance(problem, SystemExit):
        if problem.code is None or isinstance(problem.code, int):
            return (problem.code or 0) & 0xFF
        print(problem.code, file=sys.stderr)
        return 1
    if problem.__traceback__ is not None:
        problem = problem.with_traceback(problem.__traceback__.tb_next)  # without our own frame
    if sys.excepthook is sys.__excepthook__:
        traceback.print_exception(problem)  # the built-in hook would look for the source on disk
    else:
        sys.excepthook(type(problem), problem, problem.__traceback__)
    return EXIT_MEMORY if isinstance(problem, MemoryError) else 1


class HostCall:
    """The built-in `host_call`: it asks the caller and waits for the answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, data: PlainData) -> PlainData:
        with self._lock:
            send(("host_call", data))
            outcome, value = receive()
        if outcome == "raised":
            raise RuntimeError(value)
        return value


def serve(code: str, namespace: dict[str, object]) -> int:
    """Execute the code as a module, then answer requests until the caller closes the channel.

    Returns the exit code.
    """
    failure = None
    try:
        exec(compile(code, FILE_NAME, "exec", dont_inherit=True), namespace)
    except MemoryError:
        return EXIT_MEMORY
    except BaseException as problem:
        failure = describe(problem)
    while True:
        try:
            request = receive()
        except EOFError:
            return 0
        if failure:
            send(("raised", failure))
        elif not answer(request, namespace):
            return EXIT_MEMORY


def answer(request: tuple[PlainData, ...], namespace: dict[str, object]) -> bool:
    """Do one call or evaluation and send its result. Returns False when out of memory."""
    try:
        if request[0] == "call":
            _, name, arguments, keywords = request
            value = namespace[name](*arguments, **keywords)
        else:
            value = eval(compile(request[1], "<expression>", "eval"), namespace)
        send(("value", value))
    except MemoryError:
        return False
    except BaseException as problem:
        send(("raised", describe(problem)))
    return True


def describe(problem: BaseException) -> str:
    """Describe an exception in one line, whatever its class does."""
    name = type.__getattribute__(type(problem), "__name__")
    try:
        text = " ".join(str(problem).split())
    except BaseException:
        text = "(no text)"
    return f"{name}: {text}"[:MAX_DETAIL]
