"""The one batch layout: packed, prefix-shared, unpadded.

A micro-batch is one row of N tokens made of segments. A segment is a run of tokens with at most
one parent; it attends to its ancestors and to itself, and continues its parent's positions. A
document is one segment; a pair is a prompt with two children, a group of G completions one with G.
So a prompt is computed once, and no padded token passes through a linear layer.

    batch = pack_groups(prompts, completions, device=device, token_columns={"old_logps": old})
    scores = packed_logps(model, batch)          # posttrain.packed.forward
    logps = batch.dense(scores.logps)            # (B, T), zero where batch.mask() is 0
    loss = policy_loss(logps, batch.column("old_logps"), …)

All that a training step reads from the host is packed here, before the forward, and copied at
once: a tensor made from a Python list in the middle of a step would stop the host until the device
has caught up.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Values = Sequence[float] | Tensor  # one number per token, on the host


@dataclass(frozen=True)
class Segment:
    """A run of tokens, some of which may be scored.

    parent: index of an earlier segment of the same batch, or None for a root.
    scored: for each token whether its log-prob is wanted; None scores none. The first token of a
        root has no predictor and cannot be scored.
    row: the row of the dense (B, T) view that the scored tokens belong to.
    images: those that its tokens stand for, in order (posttrain.packed.vision).
    """

    token_ids: Sequence[int]
    parent: int | None = None
    scored: Sequence[bool] | None = None
    row: int = 0
    images: Sequence[Mapping] = ()


@dataclass(frozen=True)
class Layout:
    """The segments' places in the packed row: all that attention needs to know.

    Position ids count along a path from the root, so `depths[i]` (tokens before segment i on its
    path) plus `lengths[i]` is the number of keys that the last token of segment i sees.
    """

    starts: list[int]
    lengths: list[int]
    parents: list[int]  # -1 for a root
    depths: list[int]
    device: torch.device
    plans: dict[Hashable, object] = field(default_factory=dict)  # per attention kernel, built once
    experts: Tensor | None = None  # (N, C), see posttrain.packed.replay
    images: dict[int, Sequence[Mapping]] = field(default_factory=dict)  # of segments that have any

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
    segment_ends: packed position of each segment's last token. child_ends: the same for the
    segments that continue another one, in a group its completions.
    token_columns, row_columns: the caller's numbers, (B, T) and (B,), see `column`, `row_column`.
    All tensors of a kind are views of one buffer: none of them may be written to in place.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout
    predictors: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    segment_ends: Tensor
    child_ends: Tensor
    scored: Tensor
    token_columns: Mapping[str, Tensor]
    row_columns: Mapping[str, Tensor]

    @property
    def num_rows(self) -> int:
        """B, the rows of the dense view."""
        return self.scored.shape[0]

    @property
    def num_columns(self) -> int:
        """T, the scored tokens of the row that has most."""
        return self.scored.shape[1]

    def dense(self, values: Tensor) -> Tensor:
        """Scatter one number per scored token, (S,), into (B, T); zero elsewhere."""
        out = values.new_zeros(self.num_rows, self.num_columns)
        return out.index_put((self.rows, self.columns), values)  # (S,) -> (B, T)

    def mask(self) -> Tensor:
        """(B, T) float mask, 1 where a token is scored."""
        return self.scored

    def has_column(self, name: str) -> bool:
        """True where the batch was packed with a token column of this name."""
        return name in self.token_columns

    def column(self, name: str) -> Tensor:
        """(B, T) float32 numbers that came with the batch; zero where the mask is 0.

        Raises ValueError for a name that the batch was not packed with.
        """
        return _named(self.token_columns, name, "token column")

    def row_column(self, name: str) -> Tensor:
        """(B,) float32 numbers that came with the batch, one for each row.

        Raises ValueError for a name that the batch was not packed with.
        """
        return _named(self.row_columns, name, "row column")


def with_experts(batch: PackedBatch, experts: Tensor | None) -> PackedBatch:
    """Return the batch with these (N, C) choices to replay, from the host, or with none."""
    if experts is not None:
        (flat,) = upload((experts.flatten(),), dtype=experts.dtype, device=batch.layout.device)
        experts = flat.view(experts.shape)
    return replace(batch, layout=replace(batch.layout, experts=experts))


def _named(columns: Mapping[str, Tensor], name: str, kind: str) -> Tensor:
    if name not in columns:
        found = ", ".join(columns) or "none"
        raise ValueError(f"the batch has no {kind} {name!r}; it was packed with: {found}.")
    return columns[name]


def upload(
    parts: Sequence[Values], *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Copy host sequences to `device` in one transfer; returns an (n,) view for each of them.

    On CUDA the copy does not wait: torch keeps pinned memory alive until it has been read.
    """
    sizes = [len(part) for part in parts]
    host = torch.empty(sum(sizes), dtype=dtype, pin_memory=device.type == "cuda")
    for part, place in zip(parts, host.split(sizes), strict=True):
        place.copy_(torch.as_tensor(part, dtype=dtype))
    return host.to(device, non_blocking=True).split(sizes)


def pack(
    segments: Sequence[Segment],
    *,
    num_rows: int,
    device: torch.device | str,
    token_columns: Mapping[str, Sequence[Values]] | None = None,
    row_columns: Mapping[str, Sequence[float]] | None = None,
) -> PackedBatch:
    """Lay segments one after the other and index their scored tokens.

    Args:
        segments: a parent must come before its children.
        num_rows: rows of the dense (B, T) view.
        device: where the batch goes, in one copy of integers and one of floats.
        token_columns: name -> for each row in order one number per scored token, as a sequence
            or a 1-D CPU tensor; read by `batch.column(name)`.
        row_columns: name -> one number per row; read by `batch.row_column(name)`.

    Raises:
        ValueError: for a scored token that nothing predicts, an empty segment, a parent that is
            not earlier, or a column of another length than its row.
    """
    device = torch.device(device)
    layout = Layout([], [], [], [], device)
    indices = _Indices()
    for index, segment in enumerate(segments):
        _append(layout, indices, index, segment)
    if indices.predictors and min(indices.predictors) < 0:
        raise ValueError("the first token of a root segment is scored, but nothing predicts it")
    counts = indices.number_columns(num_rows)
    # Field by field in the order of _Indices, whose names are those of PackedBatch.
    integers = upload(list(vars(indices).values()), dtype=torch.long, device=device)
    named = dict(zip(vars(indices), integers, strict=True))
    for name in ("input_ids", "position_ids"):
        named[name] = named[name][None]  # (N,) -> (1, N)
    floats = _upload_floats(counts, token_columns or {}, row_columns or {}, device)
    return PackedBatch(layout=layout, **named, **floats)


@dataclass
class _Indices:
    """The integers of a batch, as lists that grow segment by segment; see PackedBatch."""

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    predictors: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    segment_ends: list[int] = field(default_factory=list)
    child_ends: list[int] = field(default_factory=list)

    def number_columns(self, num_rows: int) -> list[int]:
        """Give the k-th scored token of a row column k; returns the scored tokens of each row."""
        used = [0] * num_rows
        for row in self.rows:
            self.columns.append(used[row])
            used[row] += 1
        return used


def _append(layout: Layout, indices: _Indices, index: int, segment: Segment) -> None:
    """Lay one more segment behind the others."""
    parent = -1 if segment.parent is None else segment.parent
    length = len(segment.token_ids)
    if not length or parent >= index:
        raise ValueError(f"segment {index}: empty, or its parent {parent} does not precede it")
    depth = 0 if parent < 0 else layout.depths[parent] + layout.lengths[parent]
    start = len(indices.input_ids)
    # The first token is predicted by the parent's last position; in a root by nothing.
    before = -1 if parent < 0 else indices.segment_ends[parent]
    for offset in _scored_offsets(segment):
        indices.predictors.append(before if offset == 0 else start + offset - 1)
        indices.targets.append(segment.token_ids[offset])
        indices.rows.append(segment.row)
    layout.starts.append(start)
    layout.lengths.append(length)
    layout.parents.append(parent)
    layout.depths.append(depth)
    if segment.images:
        layout.images[index] = segment.images
    indices.input_ids.extend(segment.token_ids)
    indices.position_ids.extend(range(depth, depth + length))
    indices.segment_ends.append(start + length - 1)
    if parent >= 0:
        indices.child_ends.append(start + length - 1)


def _scored_offsets(segment: Segment) -> list[int]:
    if segment.scored is None:
        return []
    return [offset for offset, scored in enumerate(segment.scored) if scored]


def _upload_floats(
    counts: list[int],
    token_columns: Mapping[str, Sequence[Values]],
    row_columns: Mapping[str, Sequence[float]],
    device: torch.device,
) -> dict[str, Tensor | dict[str, Tensor]]:
    """Make the mask and the caller's columns dense on the host, and upload them together.

    counts: scored tokens of each row. The padding costs a few bytes of the copy and spares the
    device one scatter for each column.
    """
    longest = max(counts, default=0)
    scored = torch.arange(longest) < torch.tensor(counts, dtype=torch.long)[:, None]  # (B, T)
    parts = [scored.float().flatten()]
    for name, values in token_columns.items():
        _check_lengths(name, [len(row) for row in values], counts)
        flat = [torch.as_tensor(row, dtype=torch.float32) for row in values]
        dense = torch.zeros(scored.shape)
        if flat:
            dense[scored] = torch.cat(flat)  # row by row, in the order of the columns
        parts.append(dense.flatten())
    for name, values in row_columns.items():
        if len(values) != len(counts):
            raise ValueError(
                f"row column {name!r}: expected {len(counts)} numbers, one for each row; "
                f"found {len(values)}."
            )
        parts.append(values)
    mask, *others = upload(parts, dtype=torch.float32, device=device)
    split = len(token_columns)
    dense_columns = (part.view(scored.shape) for part in others[:split])
    return {
        "scored": mask.view(scored.shape),
        "token_columns": dict(zip(token_columns, dense_columns, strict=True)),
        "row_columns": dict(zip(row_columns, others[split:], strict=True)),
    }


def _check_lengths(name: str, found: list[int], counts: list[int]) -> None:
    """ValueError unless a token column has one number for each scored token of each row."""
    if len(found) != len(counts):
        raise ValueError(
            f"token column {name!r}: expected {len(counts)} sequences, one for each row; "
            f"found {len(found)}."
        )
    for row, (length, count) in enumerate(zip(found, counts, strict=True)):
        if length != count:
            raise ValueError(
                f"token column {name!r}, row {row}: expected {count} numbers, one for each "
                f"scored token; found {length}."
            )


def pack_documents(documents: Sequence[dict], *, device: torch.device | str) -> PackedBatch:
    """Pack documents with `input_ids` and `trained`; row i of the dense view is document i."""
    segments = [
        Segment(d["input_ids"], scored=d["trained"], row=row, images=d.get("images") or ())
        for row, d in enumerate(documents)
    ]
    return pack(segments, num_rows=len(documents), device=device)


def pack_groups(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    device: torch.device | str,
    token_columns: Mapping[str, Sequence[Values]] | None = None,
    row_columns: Mapping[str, Sequence[float]] | None = None,
    images: Sequence[Sequence[Mapping] | None] | None = None,
) -> PackedBatch:
    """Pack each prompt once, followed by its completions, all of whose tokens are scored.

    Rows of the dense view are the completions in order: prompt 0's, then prompt 1's … Columns
    have one entry for each completion in this order; see `pack`. images: those of each prompt.
    """
    segments: list[Segment] = []
    row = 0
    images = images or [()] * len(prompts)
    for prompt, siblings, seen in zip(prompts, completions, images, strict=True):
        parent = len(segments)
        segments.append(Segment(prompt, images=seen or ()))
        for completion in siblings:
            scored = [True] * len(completion)
            segments.append(Segment(completion, parent, scored=scored, row=row))
            row += 1
    return pack(
        segments,
        num_rows=row,
        device=device,
        token_columns=token_columns,
        row_columns=row_columns,
    )


def pack_pairs(
    pairs: Sequence[dict],
    *,
    device: torch.device | str,
    row_columns: Mapping[str, Sequence[float]] | None = None,
) -> PackedBatch:
    """Pack pairs of `prompt_ids`, `chosen_ids`, `rejected_ids`: rows 2i (chosen) and 2i + 1."""
    return pack_groups(
        [pair["prompt_ids"] for pair in pairs],
        [(pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs],
        device=device,
        row_columns=row_columns,
        images=[pair.get("images") for pair in pairs],
    )


def split_by_tokens(
    num_tokens: Sequence[int], max_tokens: int, *, min_parts: int = 1
) -> list[list[int]]:
    """Cut a batch into micro-batches of at most `max_tokens` packed tokens.

    num_tokens: packed tokens of each example. Returns lists of example indices, in parts of even
    size. An example above `max_tokens` gets a part of its own. At least `min_parts` parts are
    made; those left over are empty.
    """
    # Longest first into the emptiest part: the last ones placed are short, and even out the rest.
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
