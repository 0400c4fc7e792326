"""Half precision, and what must not be rounded by it.

    logits = product(hidden, weight.T)          # bfloat16 inputs, float32 result
    hold_in_half(reference, torch.bfloat16)     # frozen weights at 2 bytes each, same results
    times = multiplier(weight)                  # the same product, many times over
    with fixed_weights(model): …                # many forwards, each weight cast and laid out once
    with restoring_half(model): …               # merge an adapter, and lose nothing by it

Trained weights are float32, the optimizer's master copy; forwards run in bfloat16 or float16 by
autocast, which casts the weights of linear layers in every forward. Three things follow. Sums and
logits have to be asked for in float32, for a product's result takes its inputs' dtype. Weights that
no optimizer moves can be held as autocast would cast them. And where many forwards follow each
other without a change of weights, as in a rollout, the casts can be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Rows of a sum that a half-precision product is added to at a time: its float32 result lies
# beside the sum for that long.
SUM_ROWS = 2**14
ROWS = 32  # that a weight's layout is chosen for; it serves any number
FEW = 16  # rows below which converting a weight to bfloat16 costs more than tiles save


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: the dtype of sums, logits and softmaxes."""
    return torch.promote_types(dtype, torch.float32)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in float32 at least whatever the inputs' dtype.

    A bfloat16 result would round logits to 8 bits before the softmax: up to 0.016 nats a token.
    """
    dtype = wide(left.dtype)
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:  # tensor cores add up in float32 anyway; this keeps what they have
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)  # products of two bfloat16 numbers are exact there


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in total's dtype and without a copy of its size."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    # On a CPU a product with a float32 result costs twice as much. Each bfloat16 one is rounded as
    # autocast rounds the gradient of every other layer; the sum stays float32.
    multiply = torch.mm if left.dtype == torch.bfloat16 and not left.is_cuda else product
    for start in range(0, len(total), SUM_ROWS):
        rows = slice(start, start + SUM_ROWS)
        total[rows] += multiply(left[rows], right)


# Casts that are kept.

_CASTS: ContextVar[dict[tuple, tuple[Callable, Tensor]] | None] = ContextVar("casts", default=None)


@contextmanager
def keeping_casts(device: torch.device) -> Iterator[None]:
    """Inside, weights that do not change are cast to half precision once, not in each forward.

    For forwards without gradient, such as the tokens of a rollout; costs 2 bytes a parameter for
    that long. Autocast keeps its own casts until the outermost autocast context ends; this is
    one, as enabled as it finds autocast, so the contexts that accelerate opens in every forward
    share them. They are cleared at the end: a cast made without gradient must not be found by a
    training forward.
    """
    enabled, dtype = (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
    )
    token = _CASTS.set({})
    try:
        with torch.autocast(device.type, dtype, enabled=enabled):
            yield
    finally:
        _CASTS.reset(token)
        torch.clear_autocast_cache()


# Weights in the layout that a CPU's kernels read. A product lays its weight out anew each time, and
# with the few rows of a decode loop that takes as long as the product itself. oneDNN's kernels,
# which torch uses in float32 through their layout alone, are also 1.1 to 1.5 times as fast as the
# others, on the processors that were measured.


def serves(weight: Tensor, dtype: torch.dtype) -> bool:
    """True where products with this whole matrix can be computed so in this dtype."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or not weight.numel():
        return False
    if hasattr(weight, "ds_id") or hasattr(weight, "to_local"):  # a shard
        return False
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.mkldnn.is_available() and dtype == torch.float32


def multiplier(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function from (S, D) rows to (S, V) rows @ weight.T, as `product` computes it.

    No gradient passes it.
    """
    weight = weight.detach()
    full = wide(weight.dtype)
    if not serves(weight, full):
        return lambda rows: product(rows, weight.T)
    laid = torch.ops.mkldnn._reorder_linear_weight(weight.to(full), ROWS)
    if weight.dtype == torch.bfloat16 and has_tiles():
        return partial(_multiply_halves, laid)
    return lambda rows: _multiply(laid, None, rows.to(full))


def has_tiles() -> bool:
    """True on a processor with AMX, whose tiles multiply bfloat16 several times faster."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return known.get("amx_bf16", False) and hasattr(setting, "fp32_precision")


def _multiply_halves(laid: Tensor, rows: Tensor) -> Tensor:
    """The float32 product of numbers that bfloat16 holds exactly, and so its tiles' sums.

    oneDNN's setting is that of the process, for as long as the product takes.
    """
    if rows.dtype != torch.bfloat16 or len(rows) < FEW:
        return _multiply(laid, None, rows.float())
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        return _multiply(laid, None, rows.float())
    finally:
        setting.fp32_precision = before


def kept_multiplier(weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the multiplier of a weight in a dtype: the same one each time inside `keeping_casts`.

    Outside forward-mode derivatives pass, as TRPO needs them.
    """
    kept = _CASTS.get()
    if kept is None:
        narrow = weight.to(dtype)
        return lambda rows: product(rows, narrow.T)
    name = id(weight), dtype
    if name not in kept:
        kept[name] = multiplier(weight.to(dtype)), weight  # while it lives no other has its id
    return kept[name][0]


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


# Frozen weights.


def half_of(args: TrainingArguments) -> torch.dtype | None:
    """Return the format of a trainer's autocast; None: float32."""
    if args.fp16:
        return torch.float16
    return torch.bfloat16 if args.bf16 else None


def hold_in_half(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen weights of linear layers in `dtype`, that of autocast, in place.

    They are the ones that autocast casts in every forward, so under it results stay the same to
    the bit. Quantised ones keep their format. Embeddings (also where the LM head shares theirs)
    and norms stay float32: a rounded embedding would make the whole residual stream half precision.
    """
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and not _is_float32(m)]
    ids = {id(module) for module in linear}
    others = {
        id(parameter)
        for module in model.modules()
        if id(module) not in ids
        for parameter in module.parameters(recurse=False)
    }
    for module in linear:
        for parameter in module.parameters(recurse=False):
            frozen = not parameter.requires_grad and parameter.is_floating_point()
            if frozen and id(parameter) not in others:
                parameter.data = parameter.data.to(dtype)


def _is_float32(module: nn.Module) -> bool:
    """True for a layer that computes in float32 even under autocast (ScalarHead)."""
    return getattr(module, "computes_in_float32", False)


@contextmanager
def restoring_half(model: nn.Module) -> Iterator[None]:
    """Inside, frozen half-precision weights may be changed; afterwards they are what they were.

    For an adapter that is merged and unmerged: W + BA - BA is not W when W has 8 bits, and the
    difference would grow with every rollout. The copies lie on the host.
    """
    saved = [
        (parameter, parameter.detach().to("cpu", copy=True))
        for parameter in model.parameters()
        if not parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)
    ]
    try:
        yield
    finally:
        for parameter, weight in saved:
            parameter.data.copy_(weight)
