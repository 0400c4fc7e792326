"""Packed attention on any device: segments gathered into a few padded calls of torch's SDPA.

    out = sdpa(query, key, value, layout=batch.layout, scale=0.125, rules=Rules(window=512))

A kernel takes the packed (N, heads, head_dim) queries and keys of one micro-batch. `sdpa` runs
anywhere; those of posttrain.packed.cuda_kernels pad nothing. Attention may pad; linear layers
never do. `dense_attention` is what an ordinary forward of the same model runs, the decode loop's
one-token steps among them.

Index tensors (a "plan") depend on the layout alone, so they are built on the host once per
micro-batch, uploaded in one copy, kept in the layout, and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.packed.batch import Layout, upload
from posttrain.packed.half import wide

# Segments share a padded call while each is at least this share of the call's longest one.
BUCKET_FILL = 0.75
# … give or take this many tokens, or short segments would each get a call of their own.
BUCKET_SLACK = 8
# … and while the call's mask stays below this many entries, which bounds its memory.
BUCKET_ENTRIES = 2**24
# On a CPU half-precision attention over at most this many keys is computed in float32: forward as
# fast, backward in up to half the time, and more exact.
WIDE_KEYS = 768


@dataclass(frozen=True)
class Rules:
    """Rules of a layer's attention besides being causal.

    window: a token sees its last `window` tokens, itself included. chunk: a token sees those in its
    own run of `chunk` positions alone. cap: scores become cap * tanh(score / cap). sinks: (heads,)
    score of one more key, whose value is 0.
    """

    window: int | None = None
    chunk: int | None = None
    cap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_softmax(self) -> bool:
        """True where the scores are used as they are, so that torch's SDPA computes the rest."""
        return self.cap is None and self.sinks is None


PLAIN = Rules()


class Kernel(Protocol):
    """Attention over a packed row."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: Layout,
        scale: float,
        rules: Rules = PLAIN,
    ) -> Tensor:
        """(N, heads, dim) queries, (N, kv heads, dim) keys and values -> (N, heads, dim)."""
        ...


Plan = TypeVar("Plan")


def plan_of(layout: Layout, make: Callable[..., Plan], *settings: Hashable) -> Plan:
    """Return make(layout, *settings), made by the first layer that asks for it."""
    name = (make.__name__, *settings)
    if name not in layout.plans:
        layout.plans[name] = make(layout, *settings)
    return layout.plans[name]


# SDPA on padded buckets.


@dataclass(frozen=True)
class _Bucket:
    """Segments that share one call of SDPA: b of them, q queries and k keys each, padded."""

    segments: list[int]
    num_queries: int  # b * q
    num_keys: int  # b * k
    depths: Tensor  # (b,) tokens before each segment on its path
    is_child: bool  # False: all depths are 0


@dataclass(frozen=True)
class _SdpaPlan:
    """Indices into the packed row for all buckets, one after the other, padded with 0.

    One gather serves all buckets: in the backward pass a gather of its own would cost each of
    them a pass over the gradients of all packed tokens.
    """

    buckets: list[_Bucket]
    queries: Tensor
    keys: Tensor
    outputs: Tensor  # (N,) where the output of packed token n lies among the queries


def _bucket_segments(layout: Layout) -> list[list[int]]:
    """Group segments of similar query and key lengths, roots apart from children."""

    def size(i: int) -> tuple[bool, int, int]:
        return (layout.depths[i] > 0, layout.lengths[i], layout.depths[i] + layout.lengths[i])

    buckets: list[list[int]] = []
    longest = (False, 0, 0)
    # Longest first, so that the first segment of a bucket sets its number of queries; the number
    # of keys may still grow, for a short completion of a long prompt sees more than its elders.
    for index in sorted(range(len(layout.starts)), key=size, reverse=True):
        child, queries, keys = size(index)
        fits = bool(buckets) and (
            child == longest[0]
            and queries >= BUCKET_FILL * longest[1] - BUCKET_SLACK
            and keys >= BUCKET_FILL * longest[2] - BUCKET_SLACK
            and (len(buckets[-1]) + 1) * longest[1] * max(keys, longest[2]) <= BUCKET_ENTRIES
        )
        if fits:
            buckets[-1].append(index)
            longest = (child, longest[1], max(keys, longest[2]))
        else:
            buckets.append([index])
            longest = (child, queries, keys)
    return buckets


def _indices_of(layout: Layout, segments: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """A bucket's (b, q) queries and (b, k) keys, and a mask of the queries that are no padding."""
    lengths = [layout.lengths[i] for i in segments]
    num_keys = max(layout.depths[i] + layout.lengths[i] for i in segments)
    places = torch.arange(max(lengths))
    valid = places < torch.tensor(lengths)[:, None]  # (b, q)
    queries = (places + torch.tensor([layout.starts[i] for i in segments])[:, None]) * valid
    keys = []
    for i in segments:
        row = [place for start, stop in layout.key_ranges(i) for place in range(start, stop)]
        keys.append(row + [0] * (num_keys - len(row)))
    return queries, torch.tensor(keys), valid


def _sdpa_plan(layout: Layout) -> _SdpaPlan:
    segments = _bucket_segments(layout)
    made = [_indices_of(layout, part) for part in segments]
    queries, keys, valid = (torch.cat([x[i].flatten() for x in made]) for i in range(3))
    real = valid.nonzero().squeeze(1)  # places of the N queries that are no padding …
    outputs = real[queries[real].argsort()]  # … in the order of the packed row
    depths = [layout.depths[i] for part in segments for i in part]
    queries, keys, outputs, depths = upload(
        (queries, keys, outputs, depths), dtype=torch.long, device=layout.device
    )
    buckets = []
    depths = depths.split([len(part) for part in segments])
    for part, (q, k, _), depth in zip(segments, made, depths, strict=True):
        is_child = any(layout.depths[i] for i in part)
        buckets.append(_Bucket(part, q.numel(), k.numel(), depth, is_child))
    return _SdpaPlan(buckets, queries, keys, outputs)


def _masks(layout: Layout, window: int | None, chunk: int | None) -> list[Tensor | None]:
    """Return which keys the queries of each bucket see; None stands for the plain causal mask.

    Roots (depth 0) without window and chunk need none: under the causal mask a real query never
    reaches the padding on its right.
    """
    masks = []
    for bucket in plan_of(layout, _sdpa_plan).buckets:
        rows = len(bucket.segments)
        sizes = bucket.num_queries // rows, bucket.num_keys // rows
        is_causal = not bucket.is_child and window is None and chunk is None
        masks.append(None if is_causal else _mask(bucket.depths, *sizes, window, chunk))
    return masks


def _mask(
    depths: Tensor, num_queries: int, num_keys: int, window: int | None, chunk: int | None
) -> Tensor:
    """(b, 1, q, k): query t of a segment at depth d sees keys 0 … d + t, or the last of them.

    Made on the device, for it is far larger than the depths. A padded query is put at the last key,
    so that each sees one: without any, its gradient would be NaN.
    """
    positions = depths[:, None] + torch.arange(num_queries, device=depths.device)  # (b, q)
    positions = positions.clamp(max=num_keys - 1)[:, :, None]
    keys = torch.arange(num_keys, device=depths.device)
    return sees(positions, keys, window, chunk)[:, None]


def sees(positions: Tensor, keys: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """True where a query at a position sees a key at another: before it, and within its reach."""
    seen = keys <= positions
    if window is not None:
        seen &= keys > positions - window
    if chunk is not None:
        seen &= keys // chunk == positions // chunk
    return seen


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scale: float, rules: Rules = PLAIN
) -> Tensor:
    """Run torch's SDPA on a few padded buckets of segments; see Kernel."""
    plan = plan_of(layout, _sdpa_plan)
    window, chunk = rules.window, rules.chunk
    if window or chunk:  # those that no sequence reaches cost no mask
        longest = layout.longest_path
        window, chunk = (n if n and n < longest else None for n in (window, chunk))
    masks = plan_of(layout, _masks, window, chunk)
    queries = take(query, plan.queries).split([b.num_queries for b in plan.buckets])
    sizes = [b.num_keys for b in plan.buckets]
    keys, values = (take(states, plan.keys).split(sizes) for states in (key, value))
    outputs = []
    for bucket, mask, *parts in zip(plan.buckets, masks, queries, keys, values, strict=True):
        rows = (len(bucket.segments), -1)
        q, k, v = (part.unflatten(0, rows).transpose(1, 2) for part in parts)  # (b, h, n, d)
        out = _attend(q, k, v, mask, is_causal=mask is None, scale=scale, rules=rules)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return take(torch.cat(outputs), plan.outputs)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    rules: Rules,
) -> Tensor:
    """(b, h, n, d) attention with grouped heads, by SDPA or, with caps and sinks, by hand."""
    if rules.is_softmax:
        return _torch_sdpa(q, k, v, mask, is_causal=is_causal, scale=scale)
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    scores = q.unflatten(1, groups) @ k.unsqueeze(2).transpose(-1, -2)  # (b, h_kv, g, q, k)
    scores = scores.flatten(1, 2).to(wide(q.dtype)) * scale
    if rules.cap is not None:
        scores = rules.cap * torch.tanh(scores / rules.cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # -inf: NaN in padding
    if rules.sinks is not None:
        sinks = rules.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    shares = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype).unflatten(1, groups)
    return (shares @ v.unsqueeze(2)).flatten(1, 2)


def _torch_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float
) -> Tensor:
    """(b, h, n, d) attention with grouped heads."""
    dtype = q.dtype
    if mask is not None and q.is_cuda and q.shape[1] != k.shape[1]:
        # With a mask and grouped heads CUDA has the math path alone, which forms all n * n scores.
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    if q.device.type == "cpu" and k.shape[2] <= WIDE_KEYS:
        q, k, v = (states.to(wide(states.dtype)) for states in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    with torch.autocast(q.device.type, enabled=False):  # which would narrow them again
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
        ).to(dtype)


def take(states: Tensor, index: Tensor) -> Tensor:
    """states[index] for (N, h, d) states and an (n,) index -> (n, h, d).

    An embedding look-up, for its backward: on a CPU it adds rows much faster than index_select's,
    and on CUDA it sums the gradients of a shared prompt in float32, in one order. Indexing with
    brackets would sort for every layer, twice.
    """
    return F.embedding(index, states.flatten(1)).unflatten(-1, states.shape[1:])


def right_aligned(layout: Layout) -> Tensor:
    """(P, longest) packed positions of each segment's tokens, 0 to the left of a shorter one."""
    slots = torch.zeros(len(layout.starts), max(layout.lengths), dtype=torch.long)
    for row, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        slots[row, -length:] = torch.arange(start, start + length)
    return slots


# Ordinary forwards.


def dtype_of_cache(states: Tensor) -> torch.dtype:
    """The dtype to keep keys and values in that many queries will follow.

    On a CPU float32: its attention reads half precision at less than half the rate.
    """
    return wide(states.dtype) if states.device.type == "cpu" else states.dtype


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    rules: Rules = PLAIN,
) -> Tensor:
    """Attention of an ordinary (b, h, n, d) forward, as `generate` and the decode loop run it.

    The mask has windows and chunks in it. With one query a row, the g query heads that share a key
    head become g query rows of it: the cache is read as it lies. Repeating it for the g heads would
    copy all of it for every token.
    """
    dtype, num_heads, num_kv_heads = query.dtype, query.shape[1], key.shape[1]
    query = query.to(key.dtype)  # a CPU's cache is float32
    one_query = query.shape[2] == 1 and (mask is None or mask.shape[1] == 1)
    if not one_query or num_heads == num_kv_heads or not rules.is_softmax:
        is_causal = mask is None and query.shape[2] > 1
        out = _attend(query, key, value, mask, is_causal=is_causal, scale=scale, rules=rules)
        return out.to(dtype)
    rows = query.squeeze(2).unflatten(1, (num_kv_heads, -1))  # (b, h, 1, d) -> (b, h_kv, g, d)
    out = _torch_sdpa(rows, key, value, mask, is_causal=False, scale=scale)
    return out.flatten(1, 2).unsqueeze(2).to(dtype)  # (b, h_kv, g, d) -> (b, h, 1, d)
