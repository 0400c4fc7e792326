"""The one place that decides where a process computes, and in which number format."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

TRUE_WORDS = ("1", "true", "yes", "y", "t", "on")  # what accelerate takes for true
AMPERE = (8, 0)  # the first CUDA generation with real bfloat16, and with FlashAttention


def is_set(environment: Mapping[str, str], name: str) -> bool:
    """Return True if an environment variable has one of accelerate's words for true."""
    return environment.get(name, "").lower() in TRUE_WORDS


def this_device(environment: Mapping[str, str] = os.environ) -> torch.device:
    """Return this process's own GPU, or the CPU: without CUDA, or if accelerate got `--cpu`."""
    if torch.cuda.is_available() and not is_set(environment, "ACCELERATE_USE_CPU"):
        return torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def uses_half(dtype: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if forwards run in bfloat16 (autocast) for this `--dtype` setting.

    `auto` is bfloat16 on a GPU that computes in it, and float32 elsewhere: on a CPU float32 is the
    stable choice, and the faster one for small models.
    """
    if dtype == "auto":
        device = this_device(environment)
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE
    return dtype == "bfloat16"


def is_sharded(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if DeepSpeed or FSDP will place the model, so that we must not move it."""
    engines = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    return any(is_set(environment, engine) for engine in engines)
