"""Packed attention for any Hugging Face decoder that uses the attention interface.

Each segment's queries see its ancestors' keys and, causally, its own (posttrain.packed.batch). Three
kernels stand behind one function: SDPA on a few padded buckets (CPU, any GPU), torch's
`varlen_attn` and flash-attn (CUDA, half precision). Attention may pad; linear layers never do.

The layout travels through the model as the keyword argument `packed`. Without it the function is
plain SDPA, so that `generate` and ordinary forwards of the same model stay right.
"""

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.packed.batch import Layout, Segment, pack
from posttrain.packed.kernels import FLASH_PACKAGES, KERNELS, _dense, _sdpa
from posttrain.run.device import AMPERE

PREFIX = "posttrain_"
CHOICES = ("auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3")


# bfloat16 has 8 significant bits; outputs of unit-variance values stay within a few.
KERNEL_TOLERANCE = 0.05


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
