"""A saved model as a GGUF file in float32, and llama.cpp's log-probs against ours.

    python scripts/to_gguf.py runs/sft/model --output runs/sft/model.gguf

llama.cpp's own converter writes the file; it comes with the source of llama-cpp-python. Then
llama.cpp itself (the wheel xllamacpp) continues prompts from their text, greedily, and log-probs of
its likeliest tokens must be those of our forward, so that weights, tokenizer and special tokens are
compared. Packages are kept in `--folder`, beside the environment. Needs the extra `gguf`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.errors import ConfigError
from posttrain.models.load import load_for_inference, load_tokenizer
from posttrain.models.to_gguf import ConversionError, convert, with_packages
from posttrain.packed.batch import Segment, pack
from posttrain.packed.forward import packed_inputs
from posttrain.run.options import option, parse, plain_errors, say
from posttrain.run.settings import ModelConfig

PROMPTS = ("What is the capital of France?", "Tim has 3 apples and buys 4 more. How many has he?")
NEW_TOKENS, TOP = 24, 10
CLOSE = 1e-3  # nats


@dataclass(kw_only=True)
class Config:
    """Settings of the conversion."""

    model: str = option(help="folder of the model; also as the first argument")
    output: str | None = option(None, "the GGUF file; none: beside the model")
    folder: str = option("runs/gguf", "where converter and llama.cpp are kept")


def check(model: Path, target: Path, folder: Path) -> float:
    """Return how far llama.cpp's log-probs of likely tokens are from ours at most, in nats."""
    tokenizer = load_tokenizer(str(model))
    ours = load_for_inference(ModelConfig(model_name_or_path=str(model), dtype="float32"))
    texts = [_rendered(tokenizer, prompt) for prompt in PROMPTS]
    script = Path(__file__).with_name("ask_llama_cpp.py")
    asked = [sys.executable, str(script), str(target), json.dumps([texts, NEW_TOKENS, TOP])]
    done = with_packages(asked, folder)
    if done.returncode:
        raise ConversionError(f"llama.cpp cannot use {target}: {done.stderr[-600:]}")
    gap = 0.0
    for text, steps in zip(texts, json.loads(done.stdout.splitlines()[-1]), strict=True):
        prompt = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        answer = [step["id"] for step in steps]
        ids = [*prompt, *answer]
        batch = pack([Segment(ids)], num_rows=0, device="cpu")
        places = torch.arange(len(prompt) - 1, len(ids) - 1)
        logits = ours(**packed_inputs(batch), logits_to_keep=places).logits[0]
        for logps, step in zip(logits.float().log_softmax(-1), steps, strict=True):
            found = {top["id"]: top["logprob"] for top in step["top_logprobs"]}
            gap = max(gap, *(abs(logps[token].item() - x) for token, x in found.items()))
        say(f"        {tokenizer.decode(answer)!r}")
    return gap


def _rendered(tokenizer, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def main(config: Config) -> None:
    """Convert and compare."""
    model, folder = Path(config.model), Path(config.folder).resolve()
    if not (model / "config.json").is_file():
        raise ConfigError(f"--model: expected the folder of a saved model, found none at {model}.")
    target = Path(config.output or f"{model}.gguf")
    convert(model, target, folder)
    gap = check(model, target, folder)
    say(f"{target}: llama.cpp's log-probs are at most {gap:.1e} nats from ours")
    if not gap < CLOSE:
        raise ConversionError(f"{target}: expected less than {CLOSE} nats.")


if __name__ == "__main__":
    given = sys.argv[1:]
    given = ["--model", *given] if given and not given[0].startswith("-") else given
    with plain_errors(), torch.no_grad():
        main(parse(Config, given))
