"""How many CPU threads: for a tiny model on a busy machine one is often faster than all.

Tiny operations end before a second thread has woken, and when another process holds its core they
wait for it. So for small models a short probe decides.
"""

import os
import time

import torch
from torch import nn

from posttrain.logprobs import packed_logps
from posttrain.packing import pack_documents

SMALL = 20_000_000  # parameters, below which the probe is short and its answer open
PROBE_TOKENS, PROBE_DOCUMENTS = 48, 32
ROUNDS = 3


def choose_threads(model: nn.Module) -> int:
    """Set torch's thread count to the faster of one and all; returns it.

    Leaves it alone for models above SMALL parameters, and where OMP_NUM_THREADS is set.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    most = torch.get_num_threads()
    if most == 1 or size >= SMALL or "OMP_NUM_THREADS" in os.environ:
        return most
    seconds: dict[int, list[float]] = {1: [], most: []}
    for _ in range(ROUNDS):
        for threads, times in seconds.items():
            torch.set_num_threads(threads)
            times.append(_step_seconds(model))
    best = min(seconds, key=lambda threads: min(seconds[threads]))
    torch.set_num_threads(best)
    return best


def _step_seconds(model: nn.Module) -> float:
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [token % vocabulary for token in range(PROBE_TOKENS)]
    document = {"input_ids": ids, "trained": [False] + [True] * (PROBE_TOKENS - 1)}
    start = time.perf_counter()
    batch = pack_documents([document] * PROBE_DOCUMENTS, device="cpu")
    packed_logps(model, batch).logps.sum().backward()
    model.zero_grad()
    return time.perf_counter() - start
