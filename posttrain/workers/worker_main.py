"""What runs in the processes of `workers`: a template that forks, and the workers it forks.

The template reads commands on its socket, 32 bytes each: "fork" comes with a worker's socket and is
answered with the worker's process id, "kill 123" with 0 once that process is gone. It ends, and its
workers with it, when the socket is closed or the process that started it is gone. It blocks while
it has nothing to do.
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
from typing import Any

MAX_FRAME_BYTES = 64 << 20  # of a request or a reply; a length beyond it is no length of ours
COMMAND_BYTES = 32
PR_SET_PDEATHSIG = 1  # of Linux's prctl: a signal to get when the parent ends


def send_frame(connection: socket.socket, body: bytes, deadline: float | None = None) -> None:
    """A length and that many bytes. Past the deadline (of `time.monotonic`): TimeoutError."""
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes; at most {MAX_FRAME_BYTES}")
    connection.settimeout(_seconds_left(deadline))
    connection.sendall(struct.pack("!Q", len(body)) + body)


def receive_frame(connection: socket.socket, deadline: float | None = None) -> bytes:
    """The body of the next frame; EOFError where the other side is gone."""
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


def wait_readable(connections: Sequence[Any], timeout_seconds: float | None = None) -> set[int]:
    """The descriptors among these that can be read, or have ended. Not `select`, which fails beyond
    1,024 open files."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if timeout_seconds is None else timeout_seconds * 1000)}


def template(target: str, memory_bytes: str, control_fd: str, starter_pid: str) -> None:
    """Import the target, say so, then fork and kill workers as told."""
    control = socket.socket(fileno=int(control_fd))
    starter = _watch(int(starter_pid))
    try:
        function = _import_target(target)
    except BaseException as error:
        send_frame(control, json.dumps(f"{type(error).__name__}: {error}").encode())
        raise
    gc.collect()
    gc.freeze()  # or the collector would touch, and so copy, every page that workers share
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
    except (EOFError, OSError):  # whom we work for is gone
        for pid in workers:
            _end(pid)
        os._exit(0)


def _import_target(target: str) -> Callable[[Any], Any]:
    module_name, _, function_name = target.partition(":")
    module = importlib.import_module(module_name)
    if warm_up := getattr(module, "warm_up", None):
        warm_up()
    return getattr(module, function_name)


def _watch(pid: int) -> int | None:
    """What reads as ready once that process is gone, where the system has such a thing.

    The socket alone does not tell: whatever else that process forked holds a copy of its end.
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
        if os.getppid() == starter:  # else it ended before it could be watched
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


def _serve(function: Callable[[Any], Any], connection: socket.socket) -> None:
    """Answer requests until the socket is closed."""
    while True:
        request = receive_frame(connection)
        answer = {"value": None, "problem": "", "detail": ""}
        try:
            answer["value"] = function(pickle.loads(request))
            send_frame(connection, json.dumps(answer).encode())
        except Exception as error:  # it is the caller's to judge, and is handed to it
            detail = f"{type(error).__name__}: {error}"[:1000]
            answer = {"value": None, "problem": "raised", "detail": detail}
            send_frame(connection, json.dumps(answer).encode())
