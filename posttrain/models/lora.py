"""LoRA: which layers of a model get an adapter, and what is said of it.

    model = with_lora(model, config)          # a PEFT model; the base is frozen
    lora_summary(model)                       # "q_proj x30, v_proj x30"

PEFT makes the adapters. Layers that it refuses, or that would train apart from a weight that they
share, are left out or refused here, before any weight is read.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.run.settings import ModelConfig

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "embed_out", "score")  # how families call what comes after the last layer


def base_of(name: str) -> str:
    """Return the model that a LoRA adapter's folder is for; any other name as it is."""
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file():
        return json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return name


def with_lora(
    model: nn.Module,
    config: ModelConfig,
    *,
    task_type: str = "CAUSAL_LM",
    trained_whole: tuple[str, ...] = (),
) -> nn.Module:
    """Add the LoRA adapter that `config` describes, with initial weights from `config.seed`.

    trained_whole: names of layers that are trained, and saved with the adapter, themselves, beside
    those that `config` names.

    Raises ConfigError for layers that the model does not have or that cannot have an adapter.
    """
    from peft import LoraConfig, get_peft_model

    refuse_layers(model, config)
    # ScoringHead is no plain linear layer to PEFT's "all-linear", nor should it be adapted.
    targets: str | list[str] = config.lora_target_modules or ALL_LINEAR
    special = config.lora_skip_experts or any(map(_is_mamba, model.modules()))
    if targets == ALL_LINEAR and special:
        targets = _linear_names(model, experts=not config.lora_skip_experts)
    lora = LoraConfig(
        task_type=task_type,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=targets,
        modules_to_save=[*trained_whole, *(config.lora_modules_to_save or ())] or None,
    )
    # The random state is that of the devices named: without a name fork_rng copies, and warns of,
    # the state of every GPU of the machine.
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(getattr(config, "seed", 0))  # RunConfig's; ModelConfig has none
            return get_peft_model(model, lora)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--use_peft: PEFT cannot adapt these layers: {reason} Where these are the fused "
            "experts of a mixture, leave them out with --lora_skip_experts."
        ) from None


def refuse_layers(model: nn.Module, config: ModelConfig) -> None:
    """Raise ConfigError for layers in `config` that the model does not have, or has tied."""
    modules = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    for flag in ("lora_target_modules", "lora_modules_to_save"):
        missing = sorted(set(getattr(config, flag) or ()) - modules.keys())
        if missing:
            raise ConfigError(
                f"--{flag}: the model has no module named {', '.join(missing)}. It has, for "
                f"example, {', '.join(_linear_names(model)[:4])}."
            )
    found = {name: modules[name] for name in config.lora_modules_to_save or ()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        for name, module in found.items():
            if module in ends:
                raise ConfigError(
                    f"--lora_modules_to_save: {name} shares its weight with the model's other end, "
                    "and trained apart from it the two would differ. Leave it out."
                )
    for name, module in found.items():
        if config.quantization != "none" and isinstance(module, nn.Linear) and module not in ends:
            raise ConfigError(
                f"--lora_modules_to_save: {name} is held in {config.quantization}, and cannot be "
                "trained itself. Leave it out, or take --lora_target_modules."
            )


def lora_summary(model: nn.Module) -> str:
    """Say which layers of a PEFT model have an adapter, and which are trained whole."""
    from peft.tuners.lora import LoraLayer, ParamWrapper
    from peft.utils import ModulesToSaveWrapper

    adapted: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            adapted[f"experts' {module.parameter_name}"] += 1
        elif isinstance(module, LoraLayer):
            adapted[name.rpartition(".")[2]] += 1
    whole = {
        name.rpartition(".")[2]: 0
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    found = [f"{name} x{count}" for name, count in adapted.items()]
    return ", ".join(found) + (f"; trained whole: {', '.join(whole)}" if whole else "")


def _linear_names(model: nn.Module, *, experts: bool = False) -> list[str]:
    """Last names of the linear layers, without the head's and those that cannot have an adapter.

    That is Mamba's out_proj, whose weight its kernels read past any adapter. experts: with layers
    in blocks whose experts are one weight.
    """
    barred = tuple(
        f"{name}.out_proj" for name, module in model.named_modules() if _is_mamba(module)
    )
    if not experts:
        fused = [
            name
            for name, module in model.named_modules()
            if any(weight.dim() == 3 for weight in module.parameters(recurse=False))
        ]
        barred += tuple(name.rpartition(".")[0] + "." for name in fused)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = dict.fromkeys(name.rpartition(".")[2] for name in linear if not name.startswith(barred))
    # PEFT takes the names of shared experts' layers, wherever they stand, for the experts.
    shared = {name.rpartition(".")[2] for name in linear if name.startswith(barred)}
    return [name for name in names if name not in HEADS and name not in shared]


def _is_mamba(module: nn.Module) -> bool:
    return hasattr(module, "A_log") and hasattr(module, "D")
