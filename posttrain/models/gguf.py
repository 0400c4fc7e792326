"""GGUF files as model names: llama.cpp's format, which holds weights and tokenizer in one file.

    folder, settings = gguf_of("models/SmolLM2-135M.Q4_1.gguf")
    AutoModelForCausalLM.from_pretrained(folder, **settings)

transformers reads them, in float32: a quantised weight becomes the number that it stands for. A
model that was read so is saved as any other, in safetensors.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn

from posttrain.errors import ConfigError

SUFFIX, MAGIC = ".gguf", b"GGUF"


def gguf_of(name: str) -> tuple[str, dict[str, str]]:
    """Return what from_pretrained takes for a GGUF file, or for a folder that holds one.

    Anything else is returned as it is. Raises ConfigError for a file that is none, for several
    in one folder, and where the package that reads them is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob(f"*{SUFFIX}"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ConfigError(f"--model_name_or_path: {name} holds several: {names}. Name one.")
        path = found[0] if found else path
    if path.suffix.lower() != SUFFIX:
        return name, {}
    if not path.is_file():
        raise ConfigError(f"--model_name_or_path: there is no file {path}.")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ConfigError(
                f"--model_name_or_path: {path} is no GGUF file: it does not begin with GGUF. Was "
                "the copy complete, or is it a pointer of git-lfs?"
            )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"--model_name_or_path: {path} needs the package gguf. Install it with: "
            "pip install 'posttrain[gguf]'"
        )
    return str(path.parent), {"gguf_file": path.name}


def forget_quantisation(model: nn.Module) -> None:
    """Take transformers' marks of a quantised model off one whose weights are not quantised."""
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
