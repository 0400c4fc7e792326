"""Python objects that the ranks of a run exchange. Alone, a process is rank 0 of 1.

These use torch's collectives, because accelerate's make a PartialState where there is none yet.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_all_ranks(mine: T) -> list[T]:
    """Gather every rank's object, in the order of ranks. A collective: every rank must call it."""
    _, world = rank_and_world()
    if world == 1:
        return [mine]
    everyone: list[T] = [mine] * world
    dist.all_gather_object(everyone, mine)
    return everyone


def any_rank(condition: bool) -> bool:
    """Return True if the condition holds on any rank. A collective: every rank must call it."""
    return any(from_all_ranks(condition))
