"""The memory that training takes on one GPU, in bytes, from a model's config alone.

    shape = shape_of(config, half=True)                      # on the meta device: no weight exists
    parts = memory(shape, Setup(tokens=16384, engine="ZeRO-3", ranks=8))
    sum(parts.values())

Weights, gradients and optimizer are counted, activations are measured: the model runs on the meta
device, and what its forward would keep for the backward is added up. The head keeps no logits but
one chunk (posttrain.packed.head). On a CPU glibc's heap keeps what was freed in pieces: about as
much as activations and head take, at each size of a model (benchmarks/planned_memory.py). Left out:
the fragments of a GPU's allocator, CUDA's own context, NCCL.

ZeRO: arXiv 1910.02054 section 3. QLoRA's 4 bits and their constants: arXiv 2305.14314 section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from posttrain.packed.head import CHUNK_ENTRIES, CHUNK_ENTRIES_CUDA

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "FSDP2", "ZeRO-3")  # from the least communication on
FEW, MANY = 256, 512  # tokens of the two forwards that activations are measured with
FLOAT, HALF, ADAM = 4, 2, 8  # bytes: of a float32, of a bfloat16, of AdamW's two averages
NF4, INT8 = 0.5 + 0.127 / 8, 1.0  # bytes of a quantised weight, its constants included


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        parameters: of the model, tied ones once.
        linear: those of them in linear layers but the head, which LoRA freezes and QLoRA packs.
        sides: inputs and outputs of these layers, summed: LoRA trains rank times as many numbers.
        largest_layer: parameters of the largest decoder layer, or of the embedding.
        per_token: bytes of activations that a packed token keeps until the backward.
        layer_per_token: of one layer, the largest.
        cache_per_token: bytes of a token's keys and values while completions are generated.
        half: forwards compute in bfloat16.
    """

    parameters: int
    linear: int
    sides: int
    largest_layer: int
    layers: int
    hidden: int
    vocabulary: int
    per_token: float
    layer_per_token: float
    cache_per_token: int
    half: bool


@dataclass(frozen=True)
class Setup:
    """One way to train.

    Attributes:
        tokens: packed tokens of a micro-batch.
        trained: parameters that train; None: all.
        quantization: none, nf4 or int8, of the frozen linear layers.
        cached_tokens: of completions that are generated at once, prompts included; 0: none.
        copies: frozen copies of the model beside it, such as a reference.
    """

    tokens: int
    engine: str = "DDP"
    ranks: int = 1
    trained: int | None = None
    quantization: str = "none"
    checkpointing: bool = False
    cached_tokens: int = 0
    copies: int = 0
    on_gpu: bool = True


def memory(shape: Shape, setup: Setup) -> dict[str, float]:
    """Return the bytes on one rank at the peak of a step: weights, gradients, optimizer, …"""
    ranks, engine = setup.ranks, setup.engine
    deepspeed, split = engine.startswith("ZeRO"), engine in ("ZeRO-3", "FSDP2")
    trained = shape.parameters if setup.trained is None else setup.trained
    frozen = 0 if setup.trained is None else shape.parameters  # adapters are numbers of their own
    number = HALF if deepspeed and shape.half else FLOAT
    weights = trained * number + _frozen_bytes(shape, setup, frozen)
    casts = 0 if deepspeed or not shape.half else HALF * min(trained, shape.parameters)
    gradients = trained * number
    if engine == "DDP" and ranks > 1:
        gradients *= 2  # its buckets are copies
    optimizer = trained * (ADAM + (FLOAT if number == HALF else 0))
    share = 1 / ranks
    gathered = 0.0
    if split:
        weights, casts = weights * share, 0
        gathered = 2 * shape.largest_layer * (HALF if shape.half else FLOAT)
    if engine in ("ZeRO-2", "ZeRO-3", "FSDP2"):
        gradients *= share
    if engine != "DDP":
        optimizer *= share
    activations = setup.tokens * token_bytes(shape, checkpointing=setup.checkpointing)
    head = head_bytes(shape, setup)
    return {
        "weights": weights + casts + gathered,
        "copies": setup.copies * shape.parameters * (HALF if shape.half else FLOAT),
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "head": head,
        "kv cache": setup.cached_tokens * shape.cache_per_token,
        **({} if setup.on_gpu else {"freed": activations + head}),
    }


def peak(parts: dict[str, float]) -> float:
    """Return the bytes at the peak: the cache is gone before a step keeps activations."""
    passing = parts["activations"] + parts["head"] + parts.get("freed", 0)
    staying = sum(parts[name] for name in ("weights", "copies", "optimizer", "gradients"))
    return staying + max(passing, parts["kv cache"])


def token_bytes(shape: Shape, *, checkpointing: bool) -> float:
    """Return the bytes of activations that one packed token costs."""
    if not checkpointing:
        return shape.per_token
    return shape.layers * shape.hidden * (HALF if shape.half else FLOAT) + shape.layer_per_token


def head_bytes(shape: Shape, setup: Setup) -> float:
    """Return the bytes of one chunk of logits, its softmax and its gradient in float32."""
    entries = CHUNK_ENTRIES_CUDA if setup.on_gpu else CHUNK_ENTRIES
    return 3 * FLOAT * min(entries, setup.tokens * shape.vocabulary)


def most_tokens(shape: Shape, setup: Setup, budget: float) -> int:
    """Return the largest `tokens` with which `setup` fits into `budget` bytes; 0: none."""
    low, high = 0, 1 << 24
    while low < high:
        middle = (low + high + 1) // 2
        fits = peak(memory(shape, replace(setup, tokens=middle))) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _frozen_bytes(shape: Shape, setup: Setup, frozen: int) -> float:
    """Bytes of weights that LoRA leaves as they are: linear ones in half precision or packed."""
    if not frozen:
        return 0.0
    half = HALF if shape.half else FLOAT
    packed = {"nf4": NF4, "int8": INT8}.get(setup.quantization, half)
    linear = min(shape.linear, frozen)
    return linear * packed + (frozen - linear) * FLOAT


def shape_of(config: PretrainedConfig, *, half: bool) -> Shape:
    """Build the model of `config` on the meta device, and measure it there."""
    text = config.get_text_config()
    model = meta_model(config, half=half)
    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    layers = decoder_layers(model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    embedding = model.get_input_embeddings().weight.numel()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    few, many = kept_bytes(model, FEW), kept_bytes(model, MANY)
    per_token = (many - few) / (MANY - FEW)
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        linear=sum(weight.numel() for weight in linear),
        sides=sum(sum(weight.shape) for weight in linear),
        largest_layer=max([*sizes, embedding]),
        layers=len(layers),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        per_token=per_token,
        layer_per_token=per_token / max(1, len(layers)),
        cache_per_token=2 * len(layers) * heads * width * (HALF if half else FLOAT),
        half=half,
    )


def meta_model(config: PretrainedConfig, *, half: bool) -> nn.Module:
    """Return the causal LM of a config on the meta device, with attention that keeps no matrix."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("counted", _attention)
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="counted")
    return model.to(torch.bfloat16 if half else torch.float32).train()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the model's decoder layers: the longest list of modules in it."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def kept_bytes(model: nn.Module, tokens: int) -> int:
    """Return the bytes that a forward over one row of tokens keeps for its backward."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    with _counting(model) as kept:
        body(input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False)
    return sum(kept.values())


@contextmanager
def _counting(model: nn.Module) -> Iterator[dict[int, int]]:
    """Inside, fill {storage: bytes} with all that is kept for a backward and is no parameter."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # else the same address could be another tensor's later

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


class _Attention(torch.autograd.Function):
    """Stands for a kernel that keeps queries, keys, values, its output and its log-sums."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *_ = ctx.saved_tensors
        return gradient.new_empty(query.shape), torch.empty_like(key), torch.empty_like(value)


def _attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2), None
