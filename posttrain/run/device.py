"""The one place that decides where a process computes, and in which number format."""

import os
from collections.abc import Mapping

import torch

TRUE_WORDS = ("1", "true", "yes", "y", "t", "on")  # what accelerate takes for true
AMPERE = (8, 0)  # the first CUDA generation with real bfloat16, and with FlashAttention


def is_set(environment: Mapping[str, str], name: str) -> bool:
    """Whether an environment variable says true."""
    return environment.get(name, "").lower() in TRUE_WORDS


def this_device(environment: Mapping[str, str] = os.environ) -> torch.device:
    """This process's own GPU, or the CPU: without CUDA, or where accelerate was told `--cpu`."""
    if torch.cuda.is_available() and not is_set(environment, "ACCELERATE_USE_CPU"):
        return torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def uses_half(dtype: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether forwards run in bfloat16 (autocast over float32 weights) for a `--dtype` setting.

    `auto`: bfloat16 on a GPU that computes in it, float32 elsewhere (on a CPU it is the stable
    choice, and the faster one for small models).
    """
    if dtype == "auto":
        device = this_device(environment)
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE
    return dtype == "bfloat16"


def is_sharded(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether an engine will divide the model itself, so that it must not be moved whole."""
    engines = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    return any(is_set(environment, engine) for engine in engines)
