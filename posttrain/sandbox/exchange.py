"""One run, seen from the caller: its pipes, its channel, its end.

    exchange = Exchange(worker, wire.frame(job), limits, stdin=b"...")
    while (message := exchange.next_message()) is not None:   # what the run says over its channel
        exchange.send(answer)
    exchange.ending                                           # how it ended

Everything is pumped by one poll loop in the caller's thread, so that a run that floods one pipe, or
reads nothing from another, holds nothing up. All that comes out of the run is bounded here.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import time
from typing import Any

from posttrain.sandbox import wire
from posttrain.sandbox.interface import Limits, Status
from posttrain.sandbox.program import EXIT_MEMORY
from posttrain.sandbox.worker import Worker, WorkerError

CHUNK = 1 << 16
MOST_CHUNKS_IN_A_PIPE = 64
GRACE_SECONDS = 10.0  # the worker ends a run in time; after this the worker itself is stuck


class Exchange:
    """A run that has begun.

    Attributes:
        ending: The worker's report, once the run has ended.
        output: What it wrote to stdout and stderr, up to the limit each.
        truncated: It wrote more.
    """

    def __init__(
        self, worker: Worker, job: bytes, limits: Limits, *, stdin: bytes | None = None
    ) -> None:
        """Begin a run with this stdin and with captured output; with None, without either."""
        self.ending: dict[str, Any] | None = None
        self.output = (bytearray(), bytearray())
        self.truncated = False
        self._worker = worker
        self._limits = limits
        self._deadline = time.monotonic() + limits.wall_seconds + GRACE_SECONDS
        self._incoming = bytearray()
        self._descriptors: list[int] = []
        self._outgoing: dict[int, memoryview] = {}
        self._poll = select.poll()
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._channel = self._socket.fileno()
        self._readable = {self._channel: self._incoming}
        given: list[int] = []
        try:
            self._open_streams(stdin, given)
            worker.start_run(run_settings(limits), [*given, theirs.fileno()])
        except WorkerError as problem:
            self.ending = {"failed": str(problem)}
        except OSError:  # too many open files
            self._close_descriptors()
            raise
        finally:
            theirs.close()
            for descriptor in set(given):
                os.close(descriptor)
        self._poll.register(worker.control, select.POLLIN)
        self._queue(job)

    def _open_streams(self, stdin: bytes | None, given: list[int]) -> None:
        """Append the run's ends of stdin, stdout and stderr to `given`; keep and poll ours."""
        if stdin is None:
            given += [os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)] * 3
            return
        end, feed = os.pipe()
        given.append(end)
        os.set_blocking(feed, False)
        self._descriptors.append(feed)
        self._outgoing[feed] = memoryview(stdin)
        self._poll.register(feed, select.POLLOUT)
        for kept in self.output:
            source, end = os.pipe()
            given.append(end)
            self._descriptors.append(source)
            self._readable[source] = kept
            self._poll.register(source, select.POLLIN)

    def send(self, message: Any) -> None:
        """Queue a message for the run. WireError for what is not plain data."""
        self._queue(wire.frame(message))

    def _queue(self, framed: bytes) -> None:
        if self._channel not in self._readable:  # the run has closed it
            return
        unsent = bytes(self._outgoing.get(self._channel, b""))
        self._outgoing[self._channel] = memoryview(unsent + framed)
        self._poll.register(self._channel, select.POLLIN | select.POLLOUT)

    def next_message(self) -> tuple | None:
        """The run's next message, or None when it has ended. WireError for anything malformed."""
        while True:
            payload = self._whole_message()
            if payload is not None:
                message = wire.decode(payload)
                if type(message) is not tuple:
                    raise wire.WireError("a message of another form")
                return message
            if self.ending is not None:
                return None
            self._pump()

    def _whole_message(self) -> bytes | None:
        size = wire.HEADER.size
        if len(self._incoming) < size:
            return None
        (length,) = wire.HEADER.unpack_from(self._incoming)
        if length > wire.MAX_BYTES:
            raise wire.WireError(f"a message of {length} bytes")
        if len(self._incoming) < size + length:
            return None
        payload = bytes(self._incoming[size : size + length])
        del self._incoming[: size + length]
        return payload

    def _pump(self) -> None:
        """Wait for anything to happen and take it in."""
        events = dict(self._poll.poll(max(0.0, self._deadline - time.monotonic()) * 1000))
        if not events:
            self._worker.kill()
            self.ending = {"failed": "the worker did not end a run in time"}
            return
        ended = events.pop(self._worker.control.fileno(), 0)
        for descriptor, event in events.items():
            if descriptor in self._outgoing and event & ~select.POLLIN:
                self._write(descriptor)
            if descriptor in self._readable and event & ~select.POLLOUT:
                self._read(descriptor)
        if ended:
            self._drain()
            self.ending = self._worker.read_ending()

    def _drain(self) -> None:
        """Read what the run has left behind in its pipes. Its writers are gone."""
        for descriptor in list(self._readable):
            os.set_blocking(descriptor, False)
            for _ in range(MOST_CHUNKS_IN_A_PIPE):
                if not self._read(descriptor):
                    break

    def _read(self, descriptor: int) -> bool:
        """Take one chunk. False when there is none."""
        try:
            chunk = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            del self._readable[descriptor]
            self._outgoing.pop(descriptor, None)
            self._poll.unregister(descriptor)
            return False
        kept = self._readable[descriptor]
        if descriptor == self._channel:
            kept += chunk
            return True
        space = max(0, self._limits.output_bytes - len(kept))
        self.truncated |= len(chunk) > space
        kept += chunk[:space]
        return True

    def _write(self, descriptor: int) -> None:
        rest = self._outgoing[descriptor]
        try:
            self._outgoing[descriptor] = rest[os.write(descriptor, rest[:CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:  # the run has closed its end
            self._outgoing[descriptor] = rest[:0]
        if self._outgoing[descriptor]:
            return
        del self._outgoing[descriptor]
        if descriptor in self._readable:
            self._poll.register(descriptor, select.POLLIN)
            return
        self._poll.unregister(descriptor)
        if descriptor in self._descriptors:
            self._descriptors.remove(descriptor)
            os.close(descriptor)

    def close(self) -> None:
        """End the run if it has not ended, and close our side."""
        if self.ending is None:
            try:
                self._worker.stop_run()
                self.ending = self._worker.read_ending()
            except WorkerError as problem:
                self.ending = {"failed": str(problem)}
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.pop())


def run_settings(limits: Limits) -> dict[str, Any]:
    """What the worker needs to know of the limits."""
    return {
        "wall_seconds": limits.wall_seconds,
        "cpu_seconds": math.ceil(limits.cpu_seconds),  # the kernel counts whole seconds
        "memory_bytes": limits.memory_bytes,
        "scratch_bytes": limits.scratch_bytes,
        "max_processes": limits.max_processes,
    }


def conclude(ending: dict[str, Any], limits: Limits) -> tuple[Status, int | None, str]:
    """Status, exit code and one line on how a run ended."""
    if "failed" in ending:
        return "failed", None, ending["failed"]
    if ending["stopped"] == "wall":
        return "timeout", None, f"longer than {limits.wall_seconds:g} s"
    code = os.waitstatus_to_exitcode(ending["status"])
    exit_code = code if code >= 0 else None
    if ending["cpu"] >= math.ceil(limits.cpu_seconds) or code == -signal.SIGXCPU:
        return "timeout", exit_code, f"more than {limits.cpu_seconds:g} s of processor time"
    if code == EXIT_MEMORY:
        return "memory", exit_code, f"out of memory at {limits.memory_bytes >> 20} MB"
    if code < 0:
        return "killed", None, f"ended by signal {-code} ({signal_name(-code)})"
    return ("error" if code else "ok"), code, f"exit code {code}" if code else ""


def signal_name(number: int) -> str:
    """SIGSEGV for 11."""
    return signal.Signals(number).name if number in set(signal.Signals) else "unknown"
