"""One run, seen from the caller: its pipes, its channel, and its end.

    exchange = Exchange(worker, wire.frame(job), limits, stdin=b"...")
    while (message := exchange.next_message()) is not None:   # what the run sends on its channel
        exchange.send(answer)
    exchange.ending                                           # how it ended

One poll loop in the caller's thread serves all pipes, so that a run that floods one of them, or
never reads from another, blocks nothing. This module bounds everything that comes out of a run.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import time

from posttrain.sandbox import wire
from posttrain.sandbox.inside.program import EXIT_MEMORY
from posttrain.sandbox.interface import Limits, Status
from posttrain.sandbox.wire import Ending, PlainData, RunSettings
from posttrain.sandbox.worker import Worker, WorkerError

CHUNK = 1 << 16
MOST_CHUNKS_IN_A_PIPE = 64
GRACE_SECONDS = 10.0  # the worker ends a run at its deadline; after this, the worker is stuck


class Exchange:
    """A run that has begun.

    Attributes:
        ending: The worker's report; None until the run has ended.
        output: The bytes written to stdout and to stderr, up to the limit each.
        truncated: Whether the run wrote more than that.
    """

    def __init__(
        self, worker: Worker, job: bytes, limits: Limits, *, stdin: bytes | None = None
    ) -> None:
        """Begin a run.

        Args:
            worker: A worker that is idle.
            job: The framed message that the run's process reads first.
            limits: The limits of the run.
            stdin: The input, with which output is captured too. None: there is no input, and output
                is discarded.
        """
        self.ending: Ending | None = None
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
            self.ending = Ending(failed=str(problem))
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
        """Append the run's ends of stdin, stdout and stderr to `given`; keep and poll our ends."""
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

    def send(self, message: PlainData) -> None:
        """Queue a message for the run. WireError if it is not plain data."""
        self._queue(wire.frame(message))

    def _queue(self, framed: bytes) -> None:
        if self._channel not in self._readable:  # the run has closed it
            return
        unsent = bytes(self._outgoing.get(self._channel, b""))
        self._outgoing[self._channel] = memoryview(unsent + framed)
        self._poll.register(self._channel, select.POLLIN | select.POLLOUT)

    def next_message(self) -> tuple[PlainData, ...] | None:
        """Wait for the run's next message. None when it has ended; WireError if it is malformed."""
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
        """Wait until a pipe or the worker is ready, and process what is there."""
        events = dict(self._poll.poll(max(0.0, self._deadline - time.monotonic()) * 1000))
        if not events:
            self._worker.kill()
            self.ending = Ending(failed="the worker did not end a run in time")
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
        """Read what an ended run has left in its pipes."""
        for descriptor in list(self._readable):
            os.set_blocking(descriptor, False)
            for _ in range(MOST_CHUNKS_IN_A_PIPE):
                if not self._read(descriptor):
                    break

    def _read(self, descriptor: int) -> bool:
        """Take one chunk. Returns False when there is none."""
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
                self.ending = Ending(failed=str(problem))
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.pop())


def run_settings(limits: Limits) -> RunSettings:
    """Select from the limits what the worker needs; the caller itself bounds the output."""
    return RunSettings(
        wall_seconds=limits.wall_seconds,
        cpu_seconds=math.ceil(limits.cpu_seconds),  # the kernel counts whole seconds
        memory_bytes=limits.memory_bytes,
        scratch_bytes=limits.scratch_bytes,
        max_processes=limits.max_processes,
    )


def conclude(ending: Ending, limits: Limits) -> tuple[Status, int | None, str]:
    """Translate a worker's report into status, exit code and one line on how the run ended."""
    if ending.failed:
        return "failed", None, ending.failed
    if ending.stopped == "wall":
        return "timeout", None, f"longer than {limits.wall_seconds:g} s"
    code = os.waitstatus_to_exitcode(ending.status)
    exit_code = code if code >= 0 else None
    if ending.cpu_seconds >= math.ceil(limits.cpu_seconds) or code == -signal.SIGXCPU:
        return "timeout", exit_code, f"more than {limits.cpu_seconds:g} s of processor time"
    if code == EXIT_MEMORY:
        return "memory", exit_code, f"out of memory at {limits.memory_bytes >> 20} MB"
    if code < 0:
        return "killed", None, f"ended by signal {-code} ({signal_name(-code)})"
    return ("error" if code else "ok"), code, f"exit code {code}" if code else ""


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGSEGV for 11, or "unknown"."""
    return signal.Signals(number).name if number in set(signal.Signals) else "unknown"
