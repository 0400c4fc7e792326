"""A packed row of documents, and models with heads on it."""

import random

import torch

from posttrain.heads import MedusaHeads, MTPModules, ParallelHeads
from posttrain.packed.batch import Segment, pack
from posttrain.packed.prepare import prepare
from tests.conftest import make_model, random_ids

LENGTHS = (5, 9, 2, 12)
MAKE = {
    "medusa": lambda model: MedusaHeads.on(model, num_heads=3),
    "mtp": lambda model: MTPModules.on(model, num_modules=2),
    "mtp hidden first": lambda model: MTPModules.on(model, num_modules=2, order="hidden_embedding"),
    "parallel": lambda model: ParallelHeads.on(model, num_heads=3),
}


def prepared(family: str = "llama", **settings) -> torch.nn.Module:
    model = make_model(family, **{"num_hidden_layers": 2, **settings})
    prepare(model)
    return model


def row_of_documents(lengths=LENGTHS, *, seed: int = 0):
    """Segments of random ids, all but the first two tokens of each scored, and their batch."""
    draw = random.Random(seed)
    segments = [
        Segment(random_ids(length, draw), scored=[n > 1 for n in range(length)], row=row)
        for row, length in enumerate(lengths)
    ]
    return segments, pack(segments, num_rows=len(segments), device="cpu")


def stir(heads: torch.nn.Module, *, seed: int = 0) -> torch.nn.Module:
    """Move every weight away from its special start, so that a mix-up shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in heads.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return heads
