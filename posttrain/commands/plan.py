"""`posttrain plan`: the memory that a recipe's run would take on GPUs, engine by engine.

    posttrain plan sft --model_name_or_path owner/name --gpus 8 --gpu_memory_gb 80
    posttrain plan --config recipes/configs/sft_llama_3.2_1b.yaml --gpus 8 --gpu_memory_gb 80

All other flags are the recipe's own. Where no recipe is named, the config's file name begins with
it. No weight is loaded: the arithmetic is in posttrain/packed/memory.py. It was compared with runs
on a CPU; no GPU has checked it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.commands.recipes import owner_of
from posttrain.errors import ConfigError
from posttrain.run.options import load, plain_errors, say, set_up_libraries
from posttrain.run.shipped import recipe_file, recipe_names

if TYPE_CHECKING:
    from posttrain.packed.memory import Setup, Shape

USAGE = "usage: posttrain plan [RECIPE] --config FILE --gpus 8 --gpu_memory_gb 80 …"
GIB = 2**30
USABLE = 0.9  # of a GPU's memory; the rest is CUDA's context, NCCL, and the allocator's fragments
DEFAULTS = {"gpus": 8, "gpu_memory_gb": 80.0}
LORA_RANK = 16
WIDTHS = (9, 7, 8, 8, 6, 7)


def main(argv: Sequence[str]) -> None:
    """Print a line for each engine, and the cheapest that fits."""
    if not argv or argv[0] in ("--help", "-h"):
        print(f"{USAGE}\n\n{__doc__.strip()}")
        return
    with plain_errors():
        set_up_libraries()
        words, found = _own_flags(list(argv))
        config = _recipe_config(words)
        plan(config, gpus=int(found["gpus"]), budget=found["gpu_memory_gb"] * GIB * USABLE)


def _own_flags(words: list[str]) -> tuple[list[str], dict[str, float]]:
    """Take `--gpus` and `--gpu_memory_gb` out of the words."""
    found = dict(DEFAULTS)
    for name in DEFAULTS:
        flag = f"--{name}"
        if flag not in words:
            continue
        place = words.index(flag)
        value = words[place + 1] if place + 1 < len(words) else "nothing"
        try:
            found[name] = float(value)
        except ValueError:
            raise ConfigError(f"{flag}: expected a number, found '{value}'.") from None
        if found[name] < 1:
            raise ConfigError(f"{flag}: expected a value at least 1, found {value}.")
        del words[place : place + 2]
    return words, found


def _recipe_config(words: list[str]) -> Any:
    """Return the settings of the recipe that the first word or the config's name says."""
    names = recipe_names()
    if words and not words[0].startswith("-"):
        name = words.pop(0)
    else:
        file = words[words.index("--config") + 1] if "--config" in words[:-1] else ""
        name = owner_of(Path(file)) or ""
    if name not in names:
        raise ConfigError(f"plan: expected a recipe first ({', '.join(names)}), found '{name}'.")
    script = recipe_file(name)
    sys.path.insert(0, str(script.parent))  # as for a script: recipes share files
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where the types of its settings are looked up
    spec.loader.exec_module(module)
    return load(module.Config, words)


def plan(config: Any, *, gpus: int, budget: float) -> None:
    """Print the plan of one recipe's settings."""
    import torch
    from transformers import AutoConfig

    from posttrain.packed.forward import tokens_at_once
    from posttrain.packed.memory import memory, most_tokens, peak, shape_of

    name = getattr(config, "model_name_or_path", None)
    if name is None:
        raise ConfigError("plan: expected a recipe that trains a model.")
    try:
        about = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--model_name_or_path: no config of {name}: {reason}") from None
    shape = shape_of(about, half=config.dtype != "float32")
    asked = config.max_tokens_per_microbatch
    tokens = asked or tokens_at_once(torch.device("cuda"))
    default = "" if asked else " (the default on GPUs)"
    size = f"{shape.parameters / 1e6:,.0f}M parameters"
    say(f"{name}: {size}, {tokens:,} tokens a forward{default}, {gpus} GPUs")
    heads = ("weights", "grads", "optim.", "activ.", "head", "cache")
    columns = "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True))
    say(f"{'':16}{'GiB a GPU':>10}{columns}{'most tokens':>13}")
    fitting = []
    for label, setup in setups(config, shape, tokens, gpus):
        parts = memory(shape, setup)
        weights, copies, *rest = (size / GIB for size in parts.values())
        most, total = most_tokens(shape, setup, budget), peak(parts) / GIB
        cells = [weights + copies, *rest]
        numbers = "".join(f"{cell:>{width}.1f}" for cell, width in zip(cells, WIDTHS, strict=True))
        say(f"{label:16}{total:>10.1f}{numbers}{most:>13,}")
        if total * GIB <= budget:
            fitting.append(label)
    if fitting:
        say(f"cheapest that fits: {fitting[0]}")
        return
    say(
        "nothing fits: lower --max_tokens_per_microbatch to what the last column says, or take "
        "--gradient_checkpointing or more GPUs"
    )


def setups(config: Any, shape: Shape, tokens: int, gpus: int) -> Iterator[tuple[str, Setup]]:
    """Yield what is compared, from the cheapest on; only LoRA where the settings ask for it."""
    from posttrain.packed.memory import ENGINES, Setup

    base = Setup(
        tokens=tokens,
        ranks=gpus,
        checkpointing=config.gradient_checkpointing,
        cached_tokens=_cached_tokens(config),
        copies=int(bool(getattr(config, "num_generations", 0) and getattr(config, "beta", 0))),
    )
    if not config.use_peft:
        for engine in ENGINES:
            yield engine, replace(base, engine=engine)
    rank = config.lora_r if config.use_peft else LORA_RANK
    lora = replace(base, trained=rank * shape.sides, copies=0)
    yield f"LoRA {rank}, DDP", lora
    yield f"QLoRA {rank}, DDP", replace(lora, quantization="nf4")


def _cached_tokens(config: Any) -> int:
    """Tokens whose keys and values lie in memory while completions are generated."""
    if not hasattr(config, "num_generations"):
        return 0
    rows = min(256, config.per_device_train_batch_size)
    return rows * (config.max_prompt_length + config.max_completion_length)
