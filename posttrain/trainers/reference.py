"""The reference is data: its log-probs are computed once, before the first step, and kept.

They come from the very model that is about to train, through the same packed forward. A resumed
run reads them back, since its model is no longer the reference.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.console import is_main_process, say
from posttrain.errors import DataError
from posttrain.ranks import rank_and_world

FILE_NAME = "reference.safetensors"


def fingerprint(pairs: Any) -> str:
    """SHA-256 over the token ids of all pairs: what cached log-probs belong to."""
    digest = hashlib.sha256()
    for pair in pairs:
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            digest.update(torch.tensor([len(pair[column]), *pair[column]]).numpy().tobytes())
    return digest.hexdigest()


def save_reference(path: Path, logps: Tensor, pairs: Any) -> None:
    """Write (pairs, 2) log-probs and the fingerprint of their data, whole or not at all."""
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({"logps": logps.cpu()}, part, metadata={"pairs": fingerprint(pairs)})
        part.replace(path)


def load_reference(path: Path, pairs: Any) -> Tensor:
    """(pairs, 2) log-probs of chosen and rejected. DataError if missing or made of other data."""
    from safetensors import safe_open

    if not path.is_file():
        raise DataError(
            f"{path} is missing: a resumed run needs the reference log-probs of its first start. "
            "Start the run anew without --resume."
        )
    with safe_open(path, framework="pt") as file:
        made_for = file.metadata()["pairs"]
    if made_for != fingerprint(pairs):
        raise DataError(
            f"{path} was made for other data than this run's {len(pairs)} pairs. "
            "Resume with the data, template and lengths that the run was started with."
        )
    return load_file(path)["logps"]


@torch.no_grad()
def compute_reference(
    score: Callable[[Sequence[dict]], Tensor], pairs: Any, *, batch_size: int, device: torch.device
) -> Tensor:
    """(pairs, 2) log-probs of all pairs, each rank scoring its share.

    score: f(examples) -> (len(examples), 2), a collective under ZeRO-3, so that every rank calls
    it equally often.
    """
    rank, world = rank_and_world()
    logps = torch.zeros(len(pairs), 2, device=device)
    num_batches = math.ceil(len(pairs) / (batch_size * world))
    say(f"        reference log-probs of {len(pairs):,} pairs, once, before the first step")
    for index in range(num_batches):
        start = (index * world + rank) * batch_size
        rows = list(range(start, min(start + batch_size, len(pairs))))
        scored = score([pairs[i] for i in rows or [0]])
        if rows:
            logps[rows] = scored.to(logps.dtype)
    if world > 1:
        dist.all_reduce(logps)  # each row is zero on every rank but one
    return logps
