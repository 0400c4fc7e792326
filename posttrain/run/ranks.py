"""Naming the rank that the others wait for, where a collective runs into its timeout.

    with naming_lost_ranks(lambda: trainer.state.global_step):
        trainer.train()        # LostRankError: rank 1 has not been heard of for 31 seconds …

A backend only says that it timed out. So every rank writes to the launch's store each second that
it lives, and at which step it is; the rank that sees the timeout reads what the others wrote.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from posttrain.errors import PosttrainError

PULSE_SECONDS = 1.0
SILENT_PULSES = 4.0  # a rank that missed this many is not merely late
LOST = ("timed out", "timeout", "connection closed by peer", "connection reset by peer")


class LostRankError(PosttrainError):
    """Another rank does not answer any more."""


@contextmanager
def naming_lost_ranks(step: Callable[[], int]) -> Iterator[None]:
    """Inside, a collective that fails because of another rank raises LostRankError with its name.

    Args:
        step: returns how many optimizer steps this rank has taken.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    pulse = _Pulse(step)
    pulse.start()
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not any(word in text for word in LOST):
            raise
        if "connection" in text:  # it ended a moment ago: wait until it can be seen
            time.sleep((SILENT_PULSES + 1) * PULSE_SECONDS)
        raise LostRankError(pulse.describe_others()) from error
    finally:
        pulse.stop()


class _Pulse(threading.Thread):
    def __init__(self, step: Callable[[], int]) -> None:
        super().__init__(name="pulse", daemon=True)
        self.step, self.rank, self.world = step, dist.get_rank(), dist.get_world_size()
        # A connection of its own: one that waits for another rank's key is blocked meanwhile.
        self.store = dist.distributed_c10d._get_default_store().clone()
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.is_set():
            with suppress(RuntimeError):  # the store's owner has left: the run ends anyway
                self.store.set(_key(self.rank), f"{time.time()} {self.step()}")
            self.is_over.wait(PULSE_SECONDS)

    def stop(self) -> None:
        self.is_over.set()
        self.join()

    def describe_others(self) -> str:
        """Say what was waited for, and which rank is not heard of any more, if there is one."""
        where = f"while the ranks waited for each other in step {self.step() + 1}"
        steps = {}
        for rank in range(self.world):
            try:
                if not self.store.check([_key(rank)]):
                    return f"rank {rank} has never been heard of {where}."
                moment, done = self.store.get(_key(rank)).decode().split()
            except RuntimeError:
                return f"rank 0, which keeps the list of ranks, is gone {where}."
            silent, steps[rank] = time.time() - float(moment), int(done)
            if silent > SILENT_PULSES * PULSE_SECONDS:
                return (
                    f"rank {rank} has not been heard of for {silent:.0f} seconds {where} "
                    "(--timeout_seconds). The same command with --resume goes on from the last "
                    "checkpoint."
                )
        done = ", ".join(f"rank {rank} after step {step}" for rank, step in steps.items())
        return f"a collective timed out {where} (--timeout_seconds), though all ranks live: {done}."


def _key(rank: int) -> str:
    return f"posttrain/pulse/{rank}"
