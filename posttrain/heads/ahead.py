"""Find which state of a packed batch predicts which token, some places on.

    (next_tokens, second) = tokens_ahead(segments, (1, 2), device=device)

Offsets are counted along a path of segments: a token's predecessors are those of its own document,
or of the prompt that its completion continues. So no target crosses from one document into another,
whatever lies beside it in the row. Computed on the host before the forward, for nothing in a
training step should make the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from jaxtyping import Int
from torch import Tensor

from posttrain.packed.batch import Segment, upload


class Ahead(NamedTuple):
    """The S targets at one offset.

    positions: packed position whose state predicts each target. targets: their ids.
    """

    positions: Int[Tensor, " S"]
    targets: Int[Tensor, " S"]


def tokens_ahead(
    segments: Sequence[Segment], offsets: Sequence[int], *, device: torch.device | str
) -> list[Ahead]:
    """Find the targets of a packed batch at each offset; offset 1 is the next token.

    A scored token is a target at an offset if its path has a token that many places before it.
    segments: those that the batch was packed from, in their order.
    """
    ids, before, scored = _tables(segments)
    parts = []
    for offset in offsets:
        positions = scored
        for _ in range(offset):
            positions = numpy.where(positions < 0, -1, before[positions])
        valid = positions >= 0
        parts += [positions[valid], ids[scored[valid]]]
    found = iter(upload(parts, dtype=torch.long, device=torch.device(device)))
    return [Ahead(positions, targets) for positions, targets in zip(found, found, strict=True)]


def count_ahead(trained: Sequence[bool], offset: int) -> int:
    """Count the targets at an offset in one document, of which these tokens are trained."""
    return sum(trained[offset:])


def following(segments: Sequence[Segment], offset: int, *, device: torch.device | str) -> Tensor:
    """(N,) the id of the token `offset` places after each packed token, in its own segment.

    Where there is none it is the segment's last token: a stand-in at the end, which no state that
    has a target sees. Raises ValueError for segments with parents, whose prompts have as many next
    tokens as completions.
    """
    if any(segment.parent is not None for segment in segments):
        raise ValueError("a prompt that several completions continue has no one next token")
    parts = []
    for segment in segments:
        places = numpy.arange(len(segment.token_ids)) + offset
        parts.append(numpy.asarray(segment.token_ids)[places.clip(max=len(places) - 1)])
    (ids,) = upload([numpy.concatenate(parts)], dtype=torch.long, device=torch.device(device))
    return ids


def _tables(segments: Sequence[Segment]) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Return the (N,) ids, the packed position before each on its path or -1, those scored."""
    ends, ids, before, scored, start = [], [], [], [], 0
    for segment in segments:
        length = len(segment.token_ids)
        previous = numpy.arange(start - 1, start + length - 1)
        previous[0] = -1 if segment.parent is None else ends[segment.parent]
        wanted = numpy.zeros(length, bool) if segment.scored is None else segment.scored
        scored.append(start + numpy.flatnonzero(wanted))
        ids.append(segment.token_ids)
        before.append(previous)
        start += length
        ends.append(start - 1)
    return tuple(numpy.concatenate(parts) for parts in (ids, before, scored))
