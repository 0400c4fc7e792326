"""The one batch layout: packed, prefix-shared, unpadded.

A micro-batch is one row of N tokens made of segments. A segment is a run of tokens with at most
one parent; it attends to its ancestors and causally to itself, and its positions continue its
parent's. A document is one segment; a preference pair is a prompt with two children; a group of
G answers is a prompt with G children. So a prompt is computed once however many answers it has,
and no padded token passes through a linear layer.

    batch = pack_pairs(pairs, device="cpu")
    scores = packed_logps(model, batch)          # posttrain.packed.head
    batch.dense(scores.logps)                    # (2 * pairs, T), zero where batch.mask() is 0
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of tokens, and which of them are scored.

    parent: index of an earlier segment of the same batch, or None for a root.
    scored: for each token whether its log-prob is wanted; None scores none. The first token of a
        root has no predictor and cannot be scored.
    row: the row of the dense (B, T) view that the scored tokens belong to.
    """

    token_ids: Sequence[int]
    parent: int | None = None
    scored: Sequence[bool] | None = None
    row: int = 0


@dataclass(frozen=True)
class Layout:
    """Where the segments lie in the packed row; what attention needs to know.

    Position ids count along a path from the root, so `depths[i]` (tokens before segment i on its
    path) plus `lengths[i]` is the number of keys that the last token of segment i sees.
    """

    starts: list[int]
    lengths: list[int]
    parents: list[int]  # -1 for a root
    depths: list[int]
    device: torch.device
    plans: dict = field(default_factory=dict)  # each attention kernel's index tensors, built once

    def key_ranges(self, segment: int) -> list[tuple[int, int]]:
        """Packed (start, stop) ranges that a segment sees: its ancestors from the root, itself."""
        ranges = []
        while segment >= 0:
            start = self.starts[segment]
            ranges.append((start, start + self.lengths[segment]))
            segment = self.parents[segment]
        return ranges[::-1]

    @property
    def longest_path(self) -> int:
        """Tokens on the longest root-to-leaf path: the context length the model must serve."""
        return max(d + n for d, n in zip(self.depths, self.lengths, strict=True))


@dataclass(frozen=True)
class PackedBatch:
    """N packed tokens, S of them scored, seen as B rows of at most T scored tokens.

    input_ids, position_ids: (1, N). predictors: (S,) packed position whose hidden state predicts
    the scored token. targets: (S,) its id. rows, columns: (S,) its place in the dense view.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout
    predictors: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    num_rows: int
    num_columns: int

    def dense(self, values: Tensor) -> Tensor:
        """Scatter one number per scored token, (S,), into (B, T); zero elsewhere."""
        out = values.new_zeros(self.num_rows, self.num_columns)
        return out.index_put((self.rows, self.columns), values)  # (S,) -> (B, T)

    def mask(self) -> Tensor:
        """(B, T) float mask, 1 where a token is scored."""
        return self.dense(torch.ones(self.rows.shape, device=self.rows.device))


def pack(segments: Sequence[Segment], *, num_rows: int, device: torch.device | str) -> PackedBatch:
    """Lay segments one after the other and index their scored tokens.

    A parent must come before its children. Raises ValueError for a scored token that nothing
    predicts, an empty segment, or a parent that is not earlier.
    """
    device = torch.device(device)
    layout = Layout([], [], [], [], device)
    token_ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    for index, segment in enumerate(segments):
        parent = -1 if segment.parent is None else segment.parent
        length = len(segment.token_ids)
        if not length or parent >= index:
            raise ValueError(f"segment {index}: empty, or its parent {parent} does not precede it")
        depth = 0 if parent < 0 else layout.depths[parent] + layout.lengths[parent]
        start = len(token_ids)
        # What predicts the first token: the parent's last position; nothing, for a root.
        before = -1 if parent < 0 else layout.starts[parent] + layout.lengths[parent] - 1
        for offset in _scored_offsets(segment):
            predictors.append(before if offset == 0 else start + offset - 1)
            targets.append(segment.token_ids[offset])
            rows.append(segment.row)
        layout.starts.append(start)
        layout.lengths.append(length)
        layout.parents.append(parent)
        layout.depths.append(depth)
        token_ids.extend(segment.token_ids)
        positions.extend(range(depth, depth + length))
    if predictors and min(predictors) < 0:
        raise ValueError("the first token of a root segment is scored, but nothing predicts it")

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    columns, num_columns = _columns(rows, num_rows)
    return PackedBatch(
        input_ids=tensor(token_ids)[None],
        position_ids=tensor(positions)[None],
        layout=layout,
        predictors=tensor(predictors),
        targets=tensor(targets),
        rows=tensor(rows),
        columns=tensor(columns),
        num_rows=num_rows,
        num_columns=num_columns,
    )


def _scored_offsets(segment: Segment) -> list[int]:
    if segment.scored is None:
        return []
    return [offset for offset, scored in enumerate(segment.scored) if scored]


def _columns(rows: list[int], num_rows: int) -> tuple[list[int], int]:
    """The k-th scored token of a row goes to column k."""
    used = [0] * num_rows
    columns = []
    for row in rows:
        columns.append(used[row])
        used[row] += 1
    return columns, max(used, default=0)


def pack_documents(documents: Sequence[dict], *, device: torch.device | str) -> PackedBatch:
    """Documents with `input_ids` and `trained`; row i of the dense view is document i."""
    segments = [
        Segment(document["input_ids"], scored=document["trained"], row=row)
        for row, document in enumerate(documents)
    ]
    return pack(segments, num_rows=len(documents), device=device)


def pack_groups(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    device: torch.device | str,
) -> PackedBatch:
    """Each prompt once, followed by its answers, all of whose tokens are scored.

    Rows of the dense view are the answers in order: prompt 0's, then prompt 1's …
    """
    segments: list[Segment] = []
    row = 0
    for prompt, siblings in zip(prompts, answers, strict=True):
        parent = len(segments)
        segments.append(Segment(prompt))
        for answer in siblings:
            segments.append(Segment(answer, parent, scored=[True] * len(answer), row=row))
            row += 1
    return pack(segments, num_rows=row, device=device)


def pack_pairs(pairs: Sequence[dict], *, device: torch.device | str) -> PackedBatch:
    """Pairs of `prompt_ids`, `chosen_ids`, `rejected_ids`: rows 2i (chosen) and 2i + 1."""
    return pack_groups(
        [pair["prompt_ids"] for pair in pairs],
        [(pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs],
        device=device,
    )


def split_by_tokens(
    num_tokens: Sequence[int], max_tokens: int, *, min_parts: int = 1
) -> list[list[int]]:
    """Cut a batch into micro-batches of at most `max_tokens` packed tokens.

    num_tokens: packed tokens of each example. Returns lists of example indices, longest first in
    the emptiest micro-batch, so that the parts are even. An example above `max_tokens` gets a
    part of its own. At least `min_parts` parts are made; those left over are empty.
    """
    order = sorted(range(len(num_tokens)), key=lambda i: -num_tokens[i])
    num_parts = max(min_parts, -(-sum(num_tokens) // max_tokens), 1)
    while True:
        parts: list[list[int]] = [[] for _ in range(num_parts)]
        loads = [0] * num_parts
        for index in order:
            part = loads.index(min(loads))
            parts[part].append(index)
            loads[part] += num_tokens[index]
        fits = all(
            load <= max_tokens or len(part) == 1 for load, part in zip(loads, parts, strict=True)
        )
        if fits:
            return [sorted(part) for part in parts]
        num_parts += 1
