"""Products with weights in the layout that a CPU's kernels read, laid out once for many of them.

    times = multiplier(weight)           # times(rows) is rows @ weight.T, in float32
    with fixed_weights(model): …         # many forwards without gradient, as in a rollout

A product lays its weight out anew each time. With the few rows of a decode loop that takes as long
as the product itself. oneDNN's kernels, which torch uses through their layout alone in float32, are
also the faster ones: 1.1 to 1.5 times on the processors that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from posttrain.packed.half import keeping_casts, product, wide

ROWS = 32  # that the layout is chosen for; it serves any number


def serves(weight: Tensor, dtype: torch.dtype) -> bool:
    """True where products with this whole matrix can be computed so in this dtype."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or not weight.numel():
        return False
    if hasattr(weight, "ds_id") or hasattr(weight, "to_local"):  # a shard
        return False
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and _has_bfloat16()
    return torch.backends.mkldnn.is_available() and dtype == torch.float32


def _has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiplier(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function from (S, D) rows to (S, V) rows @ weight.T, as half.product computes it.

    No gradient passes it.
    """
    weight = weight.detach()
    full = wide(weight.dtype)
    if not serves(weight, full):
        return lambda rows: product(rows, weight.T)
    laid = torch.ops.mkldnn._reorder_linear_weight(weight.to(full), ROWS)
    return lambda rows: _multiply(laid, None, rows.to(full))


def _multiply(laid: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, laid, bias, "none", [], "")


@contextmanager
def fixed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, what forwards without gradient make of the weights is made once, and kept."""
    device = model.get_input_embeddings().weight.device
    with keeping_casts(device), laid_out_linears(model):
        yield


@contextmanager
def laid_out_linears(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers multiply by laid-out copies of their weights, which must not change.

    For forwards without gradient. A copy takes the place of autocast's; without autocast it is
    memory on top, for that long. Results are those of the layers, but for the order of sums.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and "forward" not in vars(module)
    ]
    for layer in layers:
        layer.forward = _forward_of(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The layer's forward, which lays the weight out when it is first called."""
    weight, made = layer.weight, {}

    def lay_out(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        if not serves(weight, dtype):
            return partial(nn.Linear.forward, layer)
        laid = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), ROWS)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return lambda rows: _multiply(laid, bias, rows.to(dtype))

    def forward(rows: Tensor) -> Tensor:
        dtype = weight.dtype
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        if dtype not in made:
            made[dtype] = lay_out(dtype)
        return made[dtype](rows)

    return forward
