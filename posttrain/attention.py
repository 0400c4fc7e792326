"""Packed attention for any Hugging Face decoder that uses the attention interface.

Each segment's queries see its ancestors' keys and, causally, its own (posttrain.packing). Three
kernels stand behind one function: SDPA on a few padded buckets (CPU, any GPU), torch's
`varlen_attn` and flash-attn (CUDA, half precision). Attention may pad; linear layers never do.

The layout travels through the model as the keyword argument `packed`. Without it the function is
plain SDPA, so that `generate` and ordinary forwards of the same model stay right.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.models.device import AMPERE
from posttrain.packing import Layout, Segment, pack

PREFIX = "posttrain_"
CHOICES = ("auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3")

# Segments share a padded call while each is at least this share of the call's longest one.
BUCKET_FILL = 0.75
# … and while the call's mask stays below this many entries, which bounds its memory.
BUCKET_ENTRIES = 2**24


# bfloat16 has 8 significant bits; outputs of unit-variance values stay within a few.
KERNEL_TOLERANCE = 0.05


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


def _attention_forward(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: Callable[..., Tensor],
    scaling: float | None = None,
    packed: Layout | None = None,
    sliding_window: int | None = None,
    **_: object,  # what the interface passes to every implementation and packed attention ignores
) -> tuple[Tensor, None]:
    """The function that Hugging Face's attention interface calls: (b, h, n, d) -> (b, n, h, d)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed is None:
        return _dense(query, key, value, attention_mask, scale=scale).transpose(1, 2), None
    if sliding_window is not None and packed.longest_path > sliding_window:
        raise ConfigError(
            f"a sequence of {packed.longest_path} tokens is longer than the model's sliding window "
            f"of {sliding_window}, beyond which packed attention is not exact. Lower --max_length."
        )
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    # Under autocast rotary embedding leaves queries and keys in float32, values in half precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return kernel(query, key, value, layout=packed, scale=scale)[None], None


def register() -> None:
    """Make `posttrain_sdpa`, `posttrain_varlen` … known to transformers. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, kernel in KERNELS.items():
        AttentionInterface.register(PREFIX + name, partial(_attention_forward, kernel=kernel))
        AttentionMaskInterface.register(PREFIX + name, sdpa_mask)  # for forwards without `packed`


def choose_kernel(requested: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel to use for a request such as `auto`; ConfigError when it cannot be had."""
    problems = {name: _problem(name, device, dtype) for name in KERNELS}
    if requested == "auto":
        return next(n for n in ("varlen", "sdpa") if problems[n] is None)
    if requested not in KERNELS:
        raise ConfigError(
            f"--attn_implementation: expected one of {', '.join(CHOICES)}; found '{requested}'."
        )
    if problems[requested]:
        usable = ", ".join(name for name, problem in problems.items() if problem is None)
        raise ConfigError(
            f"--attn_implementation {requested}: {problems[requested]}. "
            f"Usable here: auto, {usable}."
        )
    return requested


def _problem(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot run here, or None."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, and this run is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, and this run computes in {dtype}"
    if torch.cuda.get_device_capability(device) < AMPERE:
        return "it needs a GPU of compute capability 8.0 (Ampere) or later"
    if name == "varlen":
        return None if _torch_has_varlen() else "this torch is too old for it (2.13 has it)"
    package = FLASH_PACKAGES[name]
    return None if importlib.util.find_spec(package) else f"the package {package} is not installed"


def _torch_has_varlen() -> bool:
    """Earlier versions of varlen_attn know neither grouped heads nor windows."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "scale", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


@torch.no_grad()
def check_kernel(name: str, *, device: torch.device) -> None:
    """Compare a kernel with SDPA on a prompt with two answers. ConfigError where they differ."""
    segments = [Segment(range(7)), Segment(range(3), 0), Segment(range(9), 0)]
    layout = pack(segments, num_rows=0, device=device).layout
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(19, heads, 64, generator=draw).to(device, torch.bfloat16) for heads in (4, 2, 2)
    )
    found = KERNELS[name](query, key, value, layout=layout, scale=0.125).float()
    wanted = _sdpa(query.float(), key.float(), value.float(), layout=layout, scale=0.125)
    gap = (found - wanted).abs().max().item()
    if not gap <= KERNEL_TOLERANCE:
        raise ConfigError(
            f"--attn_implementation {name}: its outputs differ from SDPA's by {gap:.2g} here. "
            "Use --attn_implementation sdpa."
        )
