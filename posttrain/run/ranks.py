"""What the ranks of a run tell each other in Python objects. Alone, a process is rank 0 of 1.

torch's collectives, not accelerate's: those make a PartialState where there is none yet.
"""

from typing import Any

import torch.distributed as dist


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_all_ranks(mine: Any) -> list[Any]:
    """Every rank's object, in the order of ranks; a collective."""
    _, world = rank_and_world()
    if world == 1:
        return [mine]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)
    return everyone


def any_rank(condition: bool) -> bool:
    """Whether it holds on any rank; a collective."""
    return any(from_all_ranks(condition))
