"""Heads beside a saved model: written, found, checked and read again.

    save_heads(model, folder)                # with the heads that add_heads made part of it
    check_heads(folder, model_folder)        # from config.json alone, before any weight is read
    heads = load_heads(folder, model)        # posttrain.heads.drafting.Heads

    folder/model.safetensors …               the model, for AutoModelForCausalLM, as ever
    folder/heads/config.json                 kind, sizes, and which model they are of
    folder/heads/model.safetensors           the weights of the heads

`folder/heads` with Medusa heads is what vLLM takes as the draft model. Modules of families that
keep them in their checkpoints (posttrain.heads.names) are written under those names: the weights in
`folder/mtp.safetensors`, which model.safetensors.index.json lists, their number in config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.heads.attach import check_packed, heads_of
from posttrain.heads.drafting import Heads
from posttrain.heads.medusa import MedusaHeads
from posttrain.heads.mtp import MTPModules, ParallelHeads
from posttrain.heads.names import (
    INDEX,
    as_named,
    count_modules,
    fill,
    layout_of,
    read_modules,
    weight_files,
)
from posttrain.heads.trunk import bare

FOLDER, CONFIG, WEIGHTS, NATIVE = "heads", "config.json", "model.safetensors", "mtp.safetensors"
ONE_SHARD = "model-00001-of-00001.safetensors"
# What must be the same in a model and in the config of its heads, and how the latter calls it.
SAME = {
    "model_type": "base_model_type",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "base_layers",
}
TYPES = {"medusa": "medusa", "mtp": "posttrain_mtp", "parallel": "posttrain_parallel"}


def save_heads(model: nn.Module, folder: str | Path, heads: nn.Module | None = None) -> None:
    """Write the heads of a model beside it; see the module's docstring.

    folder: where the model, or its adapter, has been saved. heads: none: those that are part of it.
    """
    folder, actor = Path(folder), bare(model)
    heads = heads_of(model) if heads is None else heads
    layout, order = layout_of(actor.config), getattr(heads, "order", None)
    if layout and order == "embedding_hidden" and (folder / CONFIG).is_file():
        _write_native(folder, as_named(heads, layout, actor), {layout.count: heads.depth})
        return
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    weights = {name: weight.detach().cpu().clone() for name, weight in heads.state_dict().items()}
    save_file(weights, place / WEIGHTS, metadata={"format": "pt"})
    _write_json(place / CONFIG, _config(heads, actor))


def _config(heads: nn.Module, model: nn.Module) -> dict[str, Any]:
    lm_head, config = model.get_output_embeddings(), model.config.get_text_config()
    found = {
        "architectures": ["MedusaModel"] if heads.kind == "medusa" else [type(heads).__name__],
        "model_type": TYPES[heads.kind],
        "hidden_size": lm_head.in_features,
        "vocab_size": lm_head.out_features,
        "base_model_type": config.model_type,
        "base_layers": config.num_hidden_layers,
        "dtype": "float32",
        **heads.settings(),
    }
    if lm_head.change.scale != 1:
        found["logit_scale"] = lm_head.change.scale  # as vLLM calls it
    return found


def _write_native(folder: Path, tensors: Mapping[str, Tensor], count: dict[str, int]) -> None:
    """Write modules beside the model's own files, and list both in the index."""
    save_file(dict(tensors), folder / NATIVE, metadata={"format": "pt"})
    index = folder / INDEX
    if index.is_file():
        content = json.loads(index.read_bytes())
    else:  # renamed, for a file of the plain name would be read without a look at the index
        (folder / WEIGHTS).rename(folder / ONE_SHARD)
        names = _names(folder / ONE_SHARD)
        content = {"metadata": {}, "weight_map": dict.fromkeys(names, ONE_SHARD)}
    content["weight_map"] |= dict.fromkeys(tensors, NATIVE)
    _write_json(index, content)
    config = json.loads((folder / CONFIG).read_bytes())
    _write_json(folder / CONFIG, config | count)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def heads_config(folder: str | Path) -> dict[str, Any] | None:
    """Return the config of the heads saved in a model's folder, or in `heads` itself, if any."""
    for place in (Path(folder) / FOLDER, Path(folder)):
        path = place / CONFIG
        found = json.loads(path.read_bytes()) if path.is_file() else {}
        if found.get("model_type") in TYPES.values():
            return found | {"place": str(place)}
    return None


def check_heads(folder: str | Path, model_folder: str | Path) -> None:
    """Raise ConfigError unless a folder has heads of this model; only config.json is read.

    A model of the same family, layers, width and vocabulary may have other weights: its heads then
    only guess worse.
    """
    path = Path(model_folder) / CONFIG
    model = json.loads(path.read_bytes()) if path.is_file() else {}
    model = model.get("text_config") or model
    found = heads_config(folder)
    if found is None:
        if model.get("model_type") in _native_types() and _has_native(folder):
            return
        raise ConfigError(
            f"{folder}: expected heads, as recipes/medusa.py and recipes/mtp.py save them; found "
            f"no {FOLDER}/{CONFIG}."
        )
    _refuse_other(folder, found, model)


def _refuse_other(folder: str | Path, found: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    for name, theirs in SAME.items():
        if name in model and model[name] != found[theirs]:
            raise ConfigError(
                f"{folder}: these are heads of another model: expected {name} {model[name]}, found "
                f"{found[theirs]}. Train heads of this model with recipes/medusa.py."
            )


def _native_types() -> set[str]:
    from posttrain.heads.names import LAYOUTS

    return set(LAYOUTS)


def _has_native(folder: str | Path) -> bool:
    return (Path(folder) / NATIVE).is_file() or any(
        name.startswith("mtp.") for path in weight_files(str(folder)) for name in _names(path)
    )


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def load_heads(folder: str | Path, model: nn.Module) -> Heads:
    """Load the heads saved in a folder for a prepared causal LM, to draft with.

    Raises ConfigError for heads of another model, and where there are none.
    """
    heads = saved_heads(model, str(folder))
    if heads is None:
        raise ConfigError(f"{folder}: expected heads of {type(bare(model)).__name__}, found none.")
    check_packed(bare(model), heads)
    return Heads(model, heads.requires_grad_(False).eval())


def saved_heads(model: nn.Module, name_or_path: str) -> nn.Module | None:
    """Make the heads that lie beside a model, with their weights; None where there are none.

    name_or_path: a folder, or a Hub name, whose checkpoint may have prediction modules.

    Raises ConfigError for heads of another model.
    """
    found = heads_config(name_or_path)
    if found is None:
        return continued_modules(model, name_or_path)
    actor = bare(model)
    text = actor.config.get_text_config().to_dict()
    text["vocab_size"] = actor.get_output_embeddings().out_features
    _refuse_other(name_or_path, found, text)
    heads = _made(model, found)
    read_into(heads, Path(found["place"]))
    return heads


def _made(model: nn.Module, found: Mapping[str, Any]) -> nn.Module:
    if found["model_type"] == TYPES["medusa"]:
        heads = MedusaHeads.on(model, num_heads=found["num_heads"])
    elif found["model_type"] == TYPES["parallel"]:
        return ParallelHeads.on(model, num_heads=found["num_heads"])
    else:
        heads = MTPModules.on(model, num_modules=found["num_modules"], order=found["order"])
    heads.drafted_ids = found.get("drafted_ids")
    return heads


def continued_modules(model: nn.Module, name_or_path: str) -> MTPModules | None:
    """Make the prediction modules that a checkpoint has, with its weights; None if it has none."""
    config = bare(model).config
    tensors = read_modules(name_or_path, config)
    if not tensors:
        return None
    layout = layout_of(config)
    heads = MTPModules.on(model, num_modules=count_modules(tensors, layout))
    fill(heads, tensors, layout, where=name_or_path)
    return heads


def read_into(heads: nn.Module, place: str | Path) -> None:
    """Read the weights of `place`/model.safetensors into heads.

    Raises ConfigError for weights of other names or shapes.
    """
    path = Path(place) / WEIGHTS
    weights, expected = load_file(path), heads.state_dict()
    for name in sorted(weights.keys() | expected.keys()):
        shapes = [tuple(x[name].shape) if name in x else None for x in (expected, weights)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{path}: expected {name} of shape {shapes[0]}, found {shapes[1]}. These are other "
                "heads than this run's."
            )
    heads.load_state_dict(weights)


def restore_heads(model: nn.Module, folder: str | Path) -> None:
    """Read the heads of a model back from where `save_heads` wrote them."""
    heads, actor, folder = heads_of(model), bare(model), Path(folder)
    if (folder / NATIVE).is_file():
        tensors = load_file(folder / NATIVE)
        fill(heads, tensors, layout_of(actor.config), where=str(folder))
    else:
        read_into(heads, folder / FOLDER)
