"""Packed attention for any Hugging Face decoder that uses the attention interface.

Each segment's queries see its ancestors' keys and, causally, its own (posttrain.packed.batch). Three
kernels stand behind one function: SDPA on a few padded buckets (CPU, any GPU), torch's
`varlen_attn` and flash-attn (CUDA, half precision). Attention may pad; linear layers never do.

The layout travels through the model as the keyword argument `packed`. Without it the function is
plain SDPA, so that `generate` and ordinary forwards of the same model stay right.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.packed.batch import Layout

# Segments share a padded call while each is at least this share of the call's longest one.
BUCKET_FILL = 0.75
# … and while the call's mask stays below this many entries, which bounds its memory.
BUCKET_ENTRIES = 2**24


@dataclass(frozen=True)
class _Bucket:
    num_segments: int  # b
    mask: Tensor | None  # (b, 1, q, k) True = sees; None: plain causal is exact


@dataclass(frozen=True)
class _SdpaPlan:
    """Gathered once for all buckets: a gather of its own would cost each bucket a pass over all
    packed tokens in the backward."""

    buckets: list[_Bucket]
    queries: Tensor  # packed positions of all buckets' queries, one after the other, padded with 0
    keys: Tensor
    query_sizes: list[int]
    key_sizes: list[int]
    outputs: Tensor  # (N,) where the output of packed token n lies among the queries


@dataclass(frozen=True)
class _VarlenPlan:
    keys: Tensor | None  # (K,) packed positions of all keys; None: the packed row itself
    cu_queries: Tensor  # (segments + 1,) int32
    cu_keys: Tensor
    max_queries: int
    max_keys: int


def _bucket_segments(layout: Layout) -> list[list[int]]:
    """Group segments of similar query and key lengths, roots apart from children."""

    def size(i: int) -> tuple[bool, int, int]:
        return (layout.depths[i] > 0, layout.lengths[i], layout.depths[i] + layout.lengths[i])

    buckets: list[list[int]] = []
    longest = (False, 0, 0)
    for index in sorted(range(len(layout.starts)), key=size, reverse=True):
        child, queries, keys = size(index)
        fits = bool(buckets) and (
            child == longest[0]
            and queries >= BUCKET_FILL * longest[1] - 8
            and keys >= BUCKET_FILL * longest[2] - 8
            and (len(buckets[-1]) + 1) * longest[1] * max(keys, longest[2]) <= BUCKET_ENTRIES
        )
        if fits:
            buckets[-1].append(index)
            longest = (child, longest[1], max(keys, longest[2]))
        else:
            buckets.append([index])
            longest = (child, queries, keys)
    return buckets


def _make_bucket(layout: Layout, segments: list[int]) -> tuple[_Bucket, Tensor, Tensor, Tensor]:
    """The bucket, its (b, q) queries and (b, k) keys, and which of the queries are no padding."""
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
    mask = None
    if any(layout.depths[i] for i in segments):
        # Query t of a segment at depth d sees keys 0 … d + t. For roots (d = 0) this is the plain
        # causal mask, under which a real query never reaches the padding on the right.
        depths = torch.tensor([layout.depths[i] for i in segments])
        last_seen = depths[:, None] + torch.arange(num_queries)  # (b, q)
        mask = (torch.arange(num_keys) <= last_seen[:, :, None])[:, None]  # (b, 1, q, k)
        mask = mask.to(layout.device)
    return _Bucket(len(segments), mask), queries, keys, valid


def _sdpa_plan(layout: Layout) -> _SdpaPlan:
    made = [_make_bucket(layout, segments) for segments in _bucket_segments(layout)]
    buckets, *indices = zip(*made, strict=True)
    queries, keys, valid = (torch.cat([part.flatten() for part in parts]) for parts in indices)
    real = valid.nonzero().squeeze(1)
    device = layout.device
    return _SdpaPlan(
        list(buckets),
        queries.to(device),
        keys.to(device),
        [part.numel() for part in indices[0]],
        [part.numel() for part in indices[1]],
        real[queries[real].argsort()].to(device),
    )


def _varlen_plan(layout: Layout) -> _VarlenPlan:
    num_keys = [d + n for d, n in zip(layout.depths, layout.lengths, strict=True)]
    keys = None
    if any(layout.depths):
        ranges = [r for i in range(len(layout.starts)) for r in layout.key_ranges(i)]
        keys = torch.cat([torch.arange(*r) for r in ranges]).to(layout.device)

    def cumulative(lengths: list[int]) -> Tensor:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return ends.to(layout.device, torch.int32)

    return _VarlenPlan(
        keys, cumulative(layout.lengths), cumulative(num_keys), max(layout.lengths), max(num_keys)
    )


def _plan(layout: Layout, name: str, make: Callable[[Layout], object]) -> object:
    if name not in layout.plans:  # every layer of the model uses the same one
        layout.plans[name] = make(layout)
    return layout.plans[name]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scale: float) -> Tensor:
    """(N, heads, dim) queries and keys -> (N, heads, dim)."""
    plan = _plan(layout, "sdpa", _sdpa_plan)
    queries = _take(query, plan.queries).split(plan.query_sizes)
    keys, values = (_take(states, plan.keys).split(plan.key_sizes) for states in (key, value))
    outputs = []
    for bucket, *parts in zip(plan.buckets, queries, keys, values, strict=True):
        rows = (bucket.num_segments, -1)
        q, k, v = (part.unflatten(0, rows).transpose(1, 2) for part in parts)  # (b, h, n, d)
        k, v = _grouped(q, k, v, bucket.mask)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bucket.mask, is_causal=bucket.mask is None, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _take(torch.cat(outputs), plan.outputs)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values for SDPA: on CUDA a mask with grouped heads would take its slow math path."""
    if mask is None or not q.is_cuda or q.shape[1] == k.shape[1]:
        return k, v
    repeats = q.shape[1] // k.shape[1]
    return k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)


def _take(states: Tensor, index: Tensor) -> Tensor:
    """states[index] for (N, h, d) states and an (n,) index -> (n, h, d)."""
    # embedding's backward adds rows much faster than index_select's on a CPU
    return F.embedding(index, states.flatten(1)).unflatten(-1, states.shape[1:])


def _varlen(query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    plan = _plan(layout, "varlen", _varlen_plan)
    if plan.keys is not None:
        key, value = key[plan.keys], value[plan.keys]
    # Window (-1, 0) is causal, aligned at the bottom right: a child's first query sees its
    # ancestors' keys and its own first one.
    return varlen_attn(
        query, key, value, plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys,
        scale=scale, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _flash(
    query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scale: float, package: str
) -> Tensor:
    flash_attn_varlen_func = importlib.import_module(package).flash_attn_varlen_func

    plan = _plan(layout, "varlen", _varlen_plan)
    if plan.keys is not None:
        key, value = key[plan.keys], value[plan.keys]
    out = flash_attn_varlen_func(
        query, key, value, plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out


FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
KERNELS: dict[str, Callable[..., Tensor]] = {
    "sdpa": _sdpa,
    "varlen": _varlen,
    **{name: partial(_flash, package=package) for name, package in FLASH_PACKAGES.items()},
}


def _dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float
) -> Tensor:
    """Attention of an ordinary (b, h, n, d) forward, as `generate` runs it."""
    key, value = _grouped(query, key, value, mask)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and query.shape[2] > 1,
        scale=scale, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
