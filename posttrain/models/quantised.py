"""Frozen weights in 4 or 8 bits, for LoRA beside them (QLoRA, arXiv 2305.14314).

    settings = quantised_settings(config)     # for from_pretrained
    hold_as_loaded(model)                     # the same results in every forward

bitsandbytes has the formats. What it computes with them depends on the mode: on a CPU it packs a
4-bit layer anew in its first forward in evaluation mode, for good and with other results, and
8-bit layers round their inputs too, by what else is in the batch, but not where they train. Here a
format is how a weight is stored: every forward multiplies by the weight that it stands for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from bitsandbytes.autograd._functions import MatMul8bitFp
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.run.engine import is_sharded, this_device

if TYPE_CHECKING:
    from posttrain.run.settings import ModelConfig


class Frozen4bit(bnb.nn.Linear4bit):
    """A 4-bit layer that always computes as in training."""

    def train(self, _mode: bool = True) -> Frozen4bit:
        """Stay in training mode; the layer has nothing else that depends on it."""
        return super().train(True)


class Frozen8bit(bnb.nn.Linear8bitLt):
    """A layer with 8-bit weights, whose inputs are not rounded."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight that the bytes stand for, made anew in each pass."""
        state, weight = self.state, self.weight  # PEFT reads the numbers, and moves some of them
        state.CB = state.CB if state.CB is not None else weight.CB
        state.SCB = state.SCB if state.SCB is not None else weight.SCB
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return MatMul8bitFp.apply(x, self.weight, None, self.bias, self.state)


KINDS = {bnb.nn.Linear4bit: Frozen4bit, bnb.nn.Linear8bitLt: Frozen8bit}


def quantised_settings(config: ModelConfig) -> dict[str, Any]:
    """Return what from_pretrained takes to read a model in the format that `config` names.

    nf4 has its scales in 8 bits too, as published. Raises ConfigError where ranks divide the model.
    """
    from transformers import BitsAndBytesConfig

    if is_sharded():
        raise ConfigError(
            "--quantization: expected whole weights on each rank (one process or DDP), found "
            "DeepSpeed ZeRO or FSDP."
        )
    formats = {
        "int8": {"load_in_8bit": True},
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        },
    }
    settings = BitsAndBytesConfig(**formats[config.quantization])
    return {"quantization_config": settings, "device_map": {"": this_device()}}


def hold_as_loaded(model: nn.Module) -> None:
    """Make the quantised layers compute alike in every mode."""
    for layer in list(model.modules()):
        if type(layer) in KINDS:
            layer.__class__ = KINDS[type(layer)]
            layer.train()


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make 4-bit layers compute in `dtype`; autocast does not reach them."""
    for layer in model.modules():
        if isinstance(layer, Frozen4bit):
            layer.compute_dtype = dtype
