"""The attention kernels behind one signature, and the index tensors that each needs.

    out = KERNELS["sdpa"](query, key, value, layout=batch.layout, scale=head_dim**-0.5)

A kernel takes the packed (N, heads, head_dim) queries and keys of one micro-batch. `sdpa` runs
anywhere: it gathers segments into a few padded buckets. `varlen` (torch) and `flash_attention_*`
(the flash-attn packages) need CUDA and half precision, and pad nothing. Attention may pad; linear
layers never do. `dense_attention` is what an ordinary forward of the same model runs, the decode
loop's one-token steps among them.

Index tensors (a "plan") depend on the layout alone, so they are built on the host once per
micro-batch, uploaded in one copy, kept in the layout, and shared by all layers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.packed.batch import Layout, upload

# Segments share a padded call while each is at least this share of the call's longest one.
BUCKET_FILL = 0.75
# … give or take this many tokens, or short segments would each get a call of their own.
BUCKET_SLACK = 8
# … and while the call's mask stays below this many entries, which bounds its memory.
BUCKET_ENTRIES = 2**24


class Kernel(Protocol):
    """Attention over a packed row."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scale: float
    ) -> Tensor:
        """(N, heads, dim) queries, (N, kv heads, dim) keys and values -> (N, heads, dim)."""
        ...


Plan = TypeVar("Plan")


def _plan(layout: Layout, make: Callable[[Layout], Plan]) -> Plan:
    """The plan that `make` builds for this layout, built by the first layer that asks for it."""
    name = make.__name__
    if name not in layout.plans:
        layout.plans[name] = make(layout)
    return layout.plans[name]


# SDPA on padded buckets.


@dataclass(frozen=True)
class _Bucket:
    """Segments that share one call of SDPA: b of them, q queries and k keys each, padded."""

    segments: list[int]
    num_queries: int  # b * q
    num_keys: int  # b * k
    mask: Tensor | None  # (b, 1, q, k) True = sees; None: plain causal is exact


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
    num_queries = max(layout.lengths[i] for i in segments)
    num_keys = max(layout.depths[i] + layout.lengths[i] for i in segments)
    queries = torch.zeros(len(segments), num_queries, dtype=torch.long)
    keys = torch.zeros(len(segments), num_keys, dtype=torch.long)
    valid = torch.zeros(len(segments), num_queries, dtype=torch.bool)
    for row, i in enumerate(segments):
        length = layout.lengths[i]
        queries[row, :length] = torch.arange(length) + layout.starts[i]
        valid[row, :length] = True
        ranges = [torch.arange(start, stop) for start, stop in layout.key_ranges(i)]
        keys[row, : layout.depths[i] + length] = torch.cat(ranges)
    return queries, keys, valid


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
        mask = _mask(depth, q.shape[1], k.shape[1]) if is_child else None
        buckets.append(_Bucket(part, q.numel(), k.numel(), mask))
    return _SdpaPlan(buckets, queries, keys, outputs)


def _mask(depths: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """(b, 1, q, k): query t of a segment at depth d sees keys 0 … d + t.

    Made on the device, for it is far larger than the depths. Roots (d = 0) need none: it would be
    the plain causal mask, under which a real query never reaches the padding on its right.
    """
    steps = torch.arange(num_queries, device=depths.device)
    last_seen = depths[:, None] + steps  # (b, q)
    return (torch.arange(num_keys, device=depths.device) <= last_seen[:, :, None])[:, None]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scale: float) -> Tensor:
    """Run torch's SDPA on a few padded buckets of segments; see Kernel."""
    plan = _plan(layout, _sdpa_plan)
    queries = _take(query, plan.queries).split([b.num_queries for b in plan.buckets])
    sizes = [b.num_keys for b in plan.buckets]
    keys, values = (_take(states, plan.keys).split(sizes) for states in (key, value))
    outputs = []
    for bucket, *parts in zip(plan.buckets, queries, keys, values, strict=True):
        rows = (len(bucket.segments), -1)
        q, k, v = (part.unflatten(0, rows).transpose(1, 2) for part in parts)  # (b, h, n, d)
        out = _torch_sdpa(q, k, v, bucket.mask, is_causal=bucket.mask is None, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _take(torch.cat(outputs), plan.outputs)


def _torch_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float
) -> Tensor:
    """(b, h, n, d) attention with grouped heads."""
    if mask is not None and q.is_cuda and q.shape[1] != k.shape[1]:
        # With a mask and grouped heads CUDA has the math path alone, which forms all n * n scores.
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def _take(states: Tensor, index: Tensor) -> Tensor:
    """states[index] for (N, h, d) states and an (n,) index -> (n, h, d).

    An embedding look-up, for its backward: on a CPU it adds rows much faster than index_select's,
    and on CUDA it sums the gradients of a shared prompt in float32, in one order. Indexing with
    brackets would sort for every layer, twice.
    """
    return F.embedding(index, states.flatten(1)).unflatten(-1, states.shape[1:])


# Variable-length kernels.


@dataclass(frozen=True)
class _VarlenPlan:
    """The bounds of each segment's queries and keys, and which tokens the keys are."""

    keys: Tensor | None  # (K,) packed positions of all keys; None: the packed row itself
    cu_queries: Tensor  # (segments + 1,) int32
    cu_keys: Tensor
    max_queries: int
    max_keys: int


def _varlen_plan(layout: Layout) -> _VarlenPlan:
    num_keys = [d + n for d, n in zip(layout.depths, layout.lengths, strict=True)]
    keys = torch.empty(0, dtype=torch.long)
    has_children = any(layout.depths)
    if has_children:  # a prompt's keys once more for each of its completions
        ranges = [r for i in range(len(layout.starts)) for r in layout.key_ranges(i)]
        keys = torch.cat([torch.arange(*r) for r in ranges])
    ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (layout.lengths, num_keys)]
    keys, cu_queries, cu_keys = upload((keys, *ends), dtype=torch.long, device=layout.device)
    return _VarlenPlan(
        keys if has_children else None,
        cu_queries.int(),
        cu_keys.int(),
        max(layout.lengths),
        max(num_keys),
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scale: float) -> Tensor:
    """Run torch's varlen_attn; see Kernel."""
    from torch.nn.attention.varlen import varlen_attn

    plan = _plan(layout, _varlen_plan)
    if plan.keys is not None:
        key, value = _take(key, plan.keys), _take(value, plan.keys)
    return varlen_attn(
        query,
        key,
        value,
        plan.cu_queries,
        plan.cu_keys,
        plan.max_queries,
        plan.max_keys,
        scale=scale,
        # Causal, aligned at the bottom right: a child's first query sees its ancestors' keys and
        # its own first one.
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _flash(
    query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scale: float, package: str
) -> Tensor:
    """Run flash-attn, of which version `package` is; see Kernel."""
    flash_attn_varlen_func = importlib.import_module(package).flash_attn_varlen_func

    plan = _plan(layout, _varlen_plan)
    if plan.keys is not None:
        key, value = _take(key, plan.keys), _take(value, plan.keys)
    out = flash_attn_varlen_func(
        query,
        key,
        value,
        plan.cu_queries,
        plan.cu_keys,
        plan.max_queries,
        plan.max_keys,
        softmax_scale=scale,
        causal=True,  # aligned at the bottom right since flash-attn 2.1
    )
    return out[0] if isinstance(out, tuple) else out  # version 3 may add the normaliser


FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
KERNELS: dict[str, Kernel] = {
    "sdpa": _sdpa,
    "varlen": _varlen,
    **{name: partial(_flash, package=package) for name, package in FLASH_PACKAGES.items()},
}


# Ordinary forwards.


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float
) -> Tensor:
    """Attention of an ordinary (b, h, n, d) forward, as `generate` and the decode loop run it.

    With one query a row, the g query heads that share a key head become g query rows of it: the
    cache is read as it lies. Repeating it for the g heads would copy all of it for every token.
    """
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    one_query = query.shape[2] == 1 and (mask is None or mask.shape[1] == 1)
    if not one_query or num_heads == num_kv_heads:
        is_causal = mask is None and query.shape[2] > 1
        return _torch_sdpa(query, key, value, mask, is_causal=is_causal, scale=scale)
    rows = query.squeeze(2).unflatten(1, (num_kv_heads, -1))  # (b, h, 1, d) -> (b, h_kv, g, d)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.flatten(1, 2).unsqueeze(2)  # (b, h_kv, g, d) -> (b, h, 1, d)
