"""Prediction modules in checkpoints: under which names families keep them.

    layout = layout_of(config)                      # None for a family that has no such names
    tensors = read_modules(folder, config)          # {} where the checkpoint has none
    fill(heads, tensors, layout, where=folder)
    tensors = as_named(heads, layout, model)        # the same names again

transformers drops these weights when it loads a model, and when it saves one, so they are read from
the safetensors files. DeepSeek V3 and GLM keep module k as a layer behind the last one, Qwen under
`mtp.`; both are what vLLM reads. Experts that transformers holds as one weight are one for each
expert there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from posttrain.errors import ConfigError

INDEX = "model.safetensors.index.json"
# A module's own names, and those of its parts in the two layouts.
PARTS = {
    "layers": {
        "enorm": "enorm",
        "hnorm": "hnorm",
        "eh_proj": "eh_proj",
        "norm": "shared_head.norm",
    },
    "mtp": {
        "enorm": "pre_fc_norm_embedding",
        "hnorm": "pre_fc_norm_hidden",
        "eh_proj": "fc",
        "norm": "norm",
    },
}
COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the model's own ends, in "layers"
FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


@dataclass(frozen=True)
class Layout:
    """Tells how a family names its modules.

    style: "layers" or "mtp". count: the setting of config.json that counts them. first: index of
    the first module, in "layers".
    """

    style: str
    count: str
    first: int = 0

    def prefix(self, module: int) -> str:
        """Return how the names of a module's block begin."""
        return (
            f"model.layers.{self.first + module}."
            if self.style == "layers"
            else (f"mtp.layers.{module}.")
        )

    def part_prefix(self, module: int) -> str:
        """Return how the names of a module's norms and projection begin."""
        return self.prefix(module) if self.style == "layers" else "mtp."

    @property
    def shares_parts(self) -> bool:
        """True where all modules have the same norms and projection."""
        return self.style == "mtp"


LAYOUTS = {
    "deepseek_v3": Layout("layers", "num_nextn_predict_layers"),
    "glm4_moe": Layout("layers", "num_nextn_predict_layers"),
    "qwen3_next": Layout("mtp", "num_nextn_predict_layers"),
    "qwen3_5_text": Layout("mtp", "mtp_num_hidden_layers"),
    "qwen3_5_moe_text": Layout("mtp", "mtp_num_hidden_layers"),
}


def layout_of(config: Any) -> Layout | None:
    """Return the names of a model's family, from its transformers config; None if it has none."""
    config = config.get_text_config()
    found = LAYOUTS.get(config.model_type)
    if found is None or found.style == "mtp":
        return found
    return Layout(found.style, found.count, config.num_hidden_layers)


def is_module_name(name: str, config: Any) -> bool:
    """Return True for the name of a weight of a prediction module in this model's checkpoint."""
    layout = layout_of(config)
    if layout is None:
        return False
    if layout.style == "mtp":
        return name.startswith("mtp.")
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return bool(found) and int(found[1]) >= layout.first


def read_modules(name_or_path: str, config: Any) -> dict[str, Tensor]:
    """Read the weights of all prediction modules of a checkpoint, under their names.

    name_or_path: a folder, or a Hub name whose files are in the cache.
    """
    if layout_of(config) is None:
        return {}
    tensors = {}
    for path in weight_files(name_or_path):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                if is_module_name(name, config):
                    tensors[name] = file.get_tensor(name)
    return tensors


def weight_files(name_or_path: str) -> list[Path]:
    """Return the safetensors files of a model: those of its index, or all."""
    folder = Path(name_or_path)
    if folder.is_file():  # of llama.cpp's format
        return []
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = ["*.safetensors", INDEX]
        folder = Path(snapshot_download(name_or_path, allow_patterns=wanted))
    index = folder / INDEX
    if index.is_file():
        named = set(json.loads(index.read_bytes())["weight_map"].values())
        return [folder / name for name in sorted(named)]
    return sorted(folder.glob("*.safetensors"))


def count_modules(tensors: Mapping[str, Tensor], layout: Layout) -> int:
    """Count the modules that these weights are of."""
    marks = [re.match(r"(?:model|mtp)\.layers\.(\d+)\.", name) for name in tensors]
    return max((int(mark[1]) - layout.first + 1 for mark in marks if mark), default=0)


def fill(heads: nn.Module, tensors: Mapping[str, Tensor], layout: Layout, *, where: str) -> None:
    """Put the weights of a checkpoint into modules.

    Raises ConfigError for weights that are missing, left over, or of another shape.
    """
    tensors = {n: t for n, t in tensors.items() if not n.endswith(COPIES)}
    heads.fused_experts = any(FUSED.match(name) for name in tensors)
    used: set[str] = set()
    for index, module in enumerate(heads.layers):
        own = {}
        for name, weight in module.state_dict().items():
            sources = _sources(name, weight, index, layout, tensors)
            used |= set(sources)
            own[name] = _joined(name, sources, tensors, where)
            if own[name].shape != weight.shape:
                raise ConfigError(
                    f"--model_name_or_path: in {where}, {sources[0]} makes a weight of shape "
                    f"{tuple(own[name].shape)}, expected {tuple(weight.shape)}. Its prediction "
                    "modules are not layers of the model's own kind."
                )
        module.load_state_dict(own)
    if left := sorted(tensors.keys() - used):
        raise ConfigError(
            f"--model_name_or_path: in {where}, {left[0]} (and {len(left) - 1} more) has no place "
            "in its prediction modules: it would be dropped. Expected modules of DeepSeek V3's, "
            "Qwen's or GLM's layout, not quantised."
        )


def share_parts(heads: nn.Module) -> None:
    """Let all modules have the norms and the projection of the first."""
    first = heads.layers[0]
    for module in heads.layers[1:]:
        for name in PARTS["mtp"]:
            setattr(module, name, getattr(first, name))


def _name(own: str, index: int, layout: Layout) -> str:
    """The checkpoint's name of a weight of module `index`."""
    part, _, rest = own.partition(".")
    if part == "block":
        return layout.prefix(index) + rest
    return f"{layout.part_prefix(index)}{PARTS[layout.style][part]}.{rest}"


def _sources(
    own: str, weight: Tensor, index: int, layout: Layout, tensors: Mapping[str, Tensor]
) -> list[str]:
    """The names in the checkpoint that make one weight."""
    name = _name(own, index, layout)
    fused = FUSED.match(name)
    if not fused or name in tensors:
        return [name]
    kinds = ("gate", "up") if fused[2] == "gate_up_proj" else ("down",)
    return [f"{fused[1]}.{e}.{k}_proj.weight" for e in range(len(weight)) for k in kinds]


def _joined(own: str, sources: list[str], tensors: Mapping[str, Tensor], where: str) -> Tensor:
    missing = [name for name in sources if name not in tensors]
    if missing:
        raise ConfigError(
            f"--model_name_or_path: in {where}, {missing[0]} is missing, which its prediction "
            "module needs. Was the copy complete?"
        )
    parts = [tensors[name] for name in sources]
    if len(parts) == 1 and not EXPERT.match(sources[0]):
        return parts[0]
    step = 2 if own.endswith("gate_up_proj") else 1
    return torch.stack([torch.cat(parts[i : i + step]) for i in range(0, len(parts), step)])


def as_named(heads: nn.Module, layout: Layout, model: nn.Module) -> dict[str, Tensor]:
    """Return all weights of modules under the names of a checkpoint, on the CPU.

    model: the causal LM, whose embedding and head the layout of DeepSeek and GLM repeats.
    """
    tensors: dict[str, Tensor] = {}
    for index, module in enumerate(heads.layers):
        for own, weight in module.state_dict().items():
            whole = _name(own, index, layout)
            for name, part in _split(whole, weight, fused_experts=heads.fused_experts):
                tensors[name] = part.detach().cpu().contiguous().clone()
        if layout.style == "layers":
            ends = (model.get_input_embeddings(), model.get_output_embeddings())
            for name, end in zip(COPIES, ends, strict=True):
                tensors[layout.prefix(index) + name] = end.weight.detach().cpu().clone()
    return tensors


def _split(name: str, weight: Tensor, *, fused_experts: bool) -> Iterator[tuple[str, Tensor]]:
    """The names and parts of one weight in the checkpoint."""
    fused = FUSED.match(name)
    if not fused or fused_experts:
        yield name, weight
        return
    kinds = ("gate", "up") if fused[2] == "gate_up_proj" else ("down",)
    for expert, of_expert in enumerate(weight):
        for kind, part in zip(kinds, of_expert.chunk(len(kinds)), strict=True):
            yield f"{fused[1]}.{expert}.{kind}_proj.weight", part
