"""The processes of a `pool`: a template that forks workers, and the workers.

The template reads commands of 32 bytes on its socket. "fork" comes with a worker's socket, and the
template answers with the worker's process id. "kill 123" is answered with 0 once that process is
gone. The template ends, and its workers with it, when the socket closes or the process that started
it is gone. It blocks while it has nothing to do.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

MAX_FRAME_BYTES = 64 << 20  # limit of a request or reply; a larger length is not one of ours
COMMAND_BYTES = 32
PR_SET_PDEATHSIG = 1  # Linux's prctl: the signal to receive when the parent ends


class HasDescriptor(Protocol):
    """Anything with a file descriptor, such as a socket."""

    def fileno(self) -> int:
        """Return the descriptor."""


def send_frame(connection: socket.socket, body: bytes, deadline: float | None = None) -> None:
    """Send a length and that many bytes. TimeoutError past the deadline (of `time.monotonic`)."""
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes; at most {MAX_FRAME_BYTES}")
    connection.settimeout(_seconds_left(deadline))
    connection.sendall(struct.pack("!Q", len(body)) + body)


def receive_frame(connection: socket.socket, deadline: float | None = None) -> bytes:
    """Receive the body of the next frame. EOFError if the other side is gone."""
    (size,) = struct.unpack("!Q", _receive(connection, 8, deadline))
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {size} bytes; at most {MAX_FRAME_BYTES}")
    return _receive(connection, size, deadline)


def _receive(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        connection.settimeout(_seconds_left(deadline))
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError("the other process closed its socket")
        parts += part
    return bytes(parts)


def _seconds_left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def wait_readable(
    connections: Sequence[HasDescriptor | int], timeout_seconds: float | None = None
) -> set[int]:
    """Wait for connections; return the descriptors of those that can be read or have ended."""
    # Not `select`, which fails beyond 1,024 open files.
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if timeout_seconds is None else timeout_seconds * 1000)}


def template(target: str, memory_bytes: str, control_fd: str, starter_pid: str) -> None:
    """Run the template: import the target, report that, then fork and kill workers as told.

    Args:
        target: The function that workers call, as "module:function".
        memory_bytes: Address space of a worker beyond that of the imports; "0" is no limit.
        control_fd: Descriptor of the socket to the starter.
        starter_pid: Process id of the starter.
    """
    control = socket.socket(fileno=int(control_fd))
    starter = _watch(int(starter_pid))
    try:
        function = _import_target(target)
    except BaseException as error:
        send_frame(control, json.dumps(f"{type(error).__name__}: {error}").encode())
        raise
    gc.collect()
    gc.freeze()  # else the collector would write to, and so copy, every page that workers share
    workers: set[int] = set()
    try:
        send_frame(control, json.dumps("").encode())
        while True:
            words, fds = _next_command(control, starter)
            if words[0] == "fork":
                workers.add(pid := _fork_worker(function, int(memory_bytes), fds[0], control))
                send_frame(control, str(pid).encode())
                continue
            if (pid := int(words[1])) in workers:
                _end(pid)
                workers.discard(pid)
            send_frame(control, b"0")
    except (EOFError, OSError):  # the starter is gone
        for pid in workers:
            _end(pid)
        os._exit(0)


def _import_target(target: str) -> Callable[[object], object]:
    module_name, _, function_name = target.partition(":")
    module = importlib.import_module(module_name)
    if warm_up := getattr(module, "warm_up", None):
        warm_up()
    return getattr(module, function_name)


def _watch(pid: int) -> int | None:
    """Return a descriptor that is readable once that process is gone, if the system has pidfds.

    The socket alone does not tell, because other forks of that process hold copies of its end.
    """
    starter = None
    with suppress(AttributeError, OSError):
        starter = os.pidfd_open(pid)
    if os.getppid() != pid:
        os._exit(0)
    return starter


def _next_command(control: socket.socket, starter: int | None) -> tuple[list[str], list[int]]:
    watched = [control] if starter is None else [control, starter]
    if starter in wait_readable(watched):
        raise EOFError
    command, fds, _, _ = socket.recv_fds(control, COMMAND_BYTES, 1)
    if not command:
        raise EOFError
    return command.decode().split(), fds


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _fork_worker(function: Callable, memory_bytes: int, fd: int, control: socket.socket) -> int:
    starter = os.getpid()
    pid = os.fork()
    if pid:
        os.close(fd)
        return pid
    try:
        control.close()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == starter:  # otherwise it ended before the signal was set
            _limit(memory_bytes)
            _serve(function, socket.socket(fileno=fd))
    finally:
        os._exit(0)


def _limit(memory_bytes: int) -> None:
    import resource  # not on Windows, where this module must still import

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes and sys.platform == "linux":
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        limit = mapped + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve(function: Callable[[object], object], connection: socket.socket) -> None:
    """Answer requests until the socket is closed."""
    while True:
        request = receive_frame(connection)
        answer = {"value": None, "problem": "", "detail": ""}
        try:
            answer["value"] = function(pickle.loads(request))
            send_frame(connection, json.dumps(answer).encode())
        except Exception as error:  # the caller decides what to do about it
            detail = f"{type(error).__name__}: {error}"[:1000]
            answer = {"value": None, "problem": "raised", "detail": detail}
            send_frame(connection, json.dumps(answer).encode())
