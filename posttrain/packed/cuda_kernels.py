"""Attention kernels without padding, for CUDA and half precision, and their comparison with SDPA.

`varlen` is torch's own, `flash_attention_*` are the flash-attn packages'. They know windows, and
flash-attn knows caps. What a kernel does not know, posttrain.packed.prepare gives to `sdpa`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.packed.batch import Layout, Segment, pack, upload
from posttrain.packed.kernels import PLAIN, Kernel, Rules, plan_of, sdpa, take

# Largest difference from SDPA in float32 that a kernel may show in bfloat16, as a share of the
# largest value: bfloat16 has 8 significant bits, and sums of a few values stay within a few steps.
KERNEL_TOLERANCE = 0.05


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


def _laid_out(layout: Layout, key: Tensor, value: Tensor) -> tuple[_VarlenPlan, Tensor, Tensor]:
    """The plan, and keys and values in its order."""
    plan = plan_of(layout, _varlen_plan)
    if plan.keys is None:
        return plan, key, value
    return plan, take(key, plan.keys), take(value, plan.keys)


def _reach(rules: Rules) -> tuple[int, int]:
    """Keys before and after a query that it sees; -1 for all of them.

    Causal, aligned at the bottom right: a child's first query sees its ancestors' keys and its own
    first one. A window of w is the w - 1 tokens before a token, and itself.
    """
    return (-1 if rules.window is None else rules.window - 1, 0)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scale: float, rules: Rules = PLAIN
) -> Tensor:
    """Run torch's varlen_attn; see Kernel."""
    from torch.nn.attention.varlen import varlen_attn

    plan, key, value = _laid_out(layout, key, value)
    return varlen_attn(
        query,
        key,
        value,
        plan.cu_queries,
        plan.cu_keys,
        plan.max_queries,
        plan.max_keys,
        scale=scale,
        window_size=_reach(rules),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: Layout,
    scale: float,
    package: str,
    rules: Rules = PLAIN,
) -> Tensor:
    """Run flash-attn, of which version `package` is; see Kernel."""
    flash_attn_varlen_func = importlib.import_module(package).flash_attn_varlen_func

    plan, key, value = _laid_out(layout, key, value)
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
        window_size=_reach(rules),
        softcap=rules.cap or 0.0,
    )
    return out[0] if isinstance(out, tuple) else out  # version 3 may add the normaliser


FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
KERNELS: dict[str, Kernel] = {
    "sdpa": sdpa,
    "varlen": _varlen,
    **{name: partial(_flash, package=package) for name, package in FLASH_PACKAGES.items()},
}


@torch.enable_grad()
def check_kernel(
    name: str,
    *,
    device: torch.device,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
) -> None:
    """Compare a kernel's outputs and gradients with SDPA's on a prompt with two completions.

    Give it the model's own heads and head size: a kernel that works for 64 may not take 256, and
    one whose forward is right may have no backward. Raises ConfigError where it fails or differs.
    """
    segments = [Segment(range(7)), Segment(range(3), 0), Segment(range(9), 0)]
    layout = pack(segments, num_rows=0, device=device).layout
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(19, heads, head_dim, generator=generator).to(device, torch.bfloat16)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]
    slopes = torch.randn(19, num_heads, head_dim, generator=generator).to(device)
    wanted = _outputs_and_gradients("sdpa", [x.float() for x in inputs], slopes, layout)
    try:
        found = _outputs_and_gradients(name, inputs, slopes, layout)
    except RuntimeError as error:  # torch's word for a head size or a backward it has not
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--attn_implementation {name}: it fails with {num_heads} heads of size {head_dim}: "
            f"{reason} Use --attn_implementation sdpa."
        ) from error
    for what, one, other in zip(("outputs", *"qkv"), found, wanted, strict=True):
        gap = (one.float() - other).abs().max().item() / max(1.0, other.abs().max().item())
        if not gap <= KERNEL_TOLERANCE:
            kind = what if what == "outputs" else f"gradients of {what}"
            raise ConfigError(
                f"--attn_implementation {name}: its {kind} differ from SDPA's by {gap:.2g} here. "
                "Use --attn_implementation sdpa."
            )


def _outputs_and_gradients(
    name: str, inputs: list[Tensor], slopes: Tensor, layout: Layout
) -> tuple[Tensor, ...]:
    """Outputs of a kernel, and the gradients of query, key and value under `slopes`."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    query, key, value = inputs
    outputs = KERNELS[name](query, key, value, layout=layout, scale=query.shape[-1] ** -0.5)
    loss = (outputs.float() * slopes).sum()
    gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return outputs.detach(), *gradients
