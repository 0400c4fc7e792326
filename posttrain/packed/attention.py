"""Packed attention for any Hugging Face decoder that uses the attention interface.

    register()                                                           # once per process
    kernel = choose_kernel("auto", device=device, dtype=torch.bfloat16)
    model.set_attn_implementation(PREFIX + kernel)

The layout of a batch travels through the model as the keyword argument `packed`; each segment's
queries then see its ancestors' keys and, causally, its own. Without it the same function is plain
attention, so that `generate` and ordinary forwards of the model stay right. The kernels themselves
are in posttrain.packed.kernels; this file says which one runs, and checks that it can. A trainer
calls posttrain.packed.forward, which does all three.
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.packed.batch import Layout, Segment, pack
from posttrain.packed.kernels import FLASH_PACKAGES, KERNELS, Kernel, dense_attention
from posttrain.run.engine import AMPERE
from posttrain.run.settings import Attention

PREFIX = "posttrain_"
CHOICES = get_args(Attention)

# Largest difference from SDPA in float32 that a kernel may show in bfloat16, as a share of the
# largest value: bfloat16 has 8 significant bits, and sums of a few values stay within a few steps.
KERNEL_TOLERANCE = 0.05


def _attention_forward(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: Kernel,
    scaling: float | None = None,
    packed: Layout | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **_: object,  # what the interface passes to every implementation and packed attention ignores
) -> tuple[Tensor, None]:
    """The function that Hugging Face's attention interface calls: (b, h, n, d) -> (b, n, h, d)."""
    if dropout:
        raise ConfigError(
            f"the model applies attention dropout ({dropout:g}), which packed attention does not "
            "have. Set it to 0 in the model's config.json."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed is None:
        out = dense_attention(query, key, value, attention_mask, scale=scale)
        return out.transpose(1, 2), None
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
    """Return the kernel to use for a request such as `auto`.

    Raises ConfigError if the requested kernel does not exist or is not available here.
    """
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
    """The reason why a kernel cannot run here, or None."""
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
    """True unless varlen_attn is missing, or so old that it lacks grouped heads and windows."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "scale", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


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
