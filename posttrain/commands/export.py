"""`posttrain export`: a saved model for those who run it.

    posttrain export runs/sft/model --to merged --output_dir out   # adapters merged
    posttrain export runs/sft/model --to vllm --output_dir out     # the same, and how to serve it
    posttrain export runs/sft/model --to gguf --output_dir out     # out/model.gguf
    posttrain export runs/sft/model --to ollama --output_dir out   # and a Modelfile

A folder that exists is not overwritten. GGUF is written by llama.cpp's own converter, which is
fetched once into `--converter_folder` and needs the extra `gguf`.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain.commands.completing import with_model_first
from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = "model.gguf"
OUTTYPES = {"auto": "auto", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(kw_only=True)
class Config:
    """Settings of one export."""

    model: str = option(help="folder or Hub name of the model or adapter; also the first argument")
    to: Literal["merged", "gguf", "ollama", "vllm"] = option(help="form to write")
    output_dir: str = option(help="folder to write; must not exist")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "number format of the weights; auto: as saved, merged adapters in float32"
    )
    template: str = option("auto", "prompt format that the model was trained with, for ollama")
    converter_folder: str = option("runs/gguf", "where llama.cpp's converter is kept")

    def check(self) -> None:
        """Raise ConfigError for a folder that exists."""
        if Path(self.output_dir).exists():
            raise ConfigError(
                f"output_dir: expected a new folder, found '{self.output_dir}'. Name another."
            )


def main(argv: Sequence[str]) -> None:
    """Write what the flags in `argv` ask for, and say how to use it."""
    config = parse(Config, with_model_first(list(argv)))
    with plain_errors():
        export(config)


def export(config: Config) -> None:
    """Write the folder whole, or not at all."""
    from posttrain.models.load import load_tokenizer
    from posttrain.run.engine import atomic_folder

    target, tokenizer = Path(config.output_dir), load_tokenizer(config.model)
    with atomic_folder(target) as partial:
        if config.to in ("merged", "vllm"):
            save_merged(config, tokenizer, partial)
        else:
            _save_gguf(config, tokenizer, partial)
    say(f"{config.to:8}written to {target}")
    quoted = shlex.quote(str(target))
    if config.to == "vllm":
        say(f"serve   vllm serve {quoted}")
    elif config.to == "ollama":
        say(f"create  ollama create {shlex.quote(target.name)} -f {quoted}/Modelfile")


def save_merged(config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write whole weights, configuration and tokenizer; an adapter is merged into its base."""
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.models.load import load_merged, load_whole

    is_adapter = (Path(config.model) / "adapter_config.json").is_file()
    if is_adapter:
        model = load_merged(AutoModelForCausalLM, config.model, dtype=torch.float32)
    else:
        model = load_whole(AutoModelForCausalLM, config.model, dtype="auto")
    if config.dtype != "auto":
        model.to(getattr(torch, config.dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_gguf(config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    from posttrain.models import to_gguf

    with tempfile.TemporaryDirectory() as merged:
        save_merged(config, tokenizer, Path(merged))
        to_gguf.convert(
            Path(merged),
            folder / WEIGHTS,
            Path(config.converter_folder).resolve(),
            outtype=OUTTYPES[config.dtype],
        )
    if config.to == "ollama":
        text = _modelfile(config, tokenizer)
        (folder / "Modelfile").write_text(text, encoding="utf-8")


def _modelfile(config: Config, tokenizer: PreTrainedTokenizerBase) -> str:
    from posttrain.data import load_prompts
    from posttrain.data.encode import stop_ids_of
    from posttrain.models.ollama import modelfile

    def render(turns: list[dict[str, str]]) -> str:
        rows = [{"prompt": turns}]
        quiet = {"say": lambda _: None}
        return load_prompts(rows, tokenizer, template=config.template, **quiet)[0]["prompt"]

    stops = tokenizer.convert_ids_to_tokens(list(stop_ids_of(config.model, tokenizer)))
    return modelfile(WEIGHTS, tokenizer, render, stops)
