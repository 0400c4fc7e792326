"""Compare decoding with guesses to plain decoding, in CPU seconds of one thread.

    python -m benchmarks.lookahead --model runs/quickstart/r1_zero/model
    python -m benchmarks.lookahead --model runs/medusa/model --lookahead heads --rows_at_once 1
    python -m benchmarks.lookahead --model SmolLM2-135M-Instruct.Q4_1.gguf --template chat \\
        --dataset gsm8k/train.jsonl --prompts 4 --num_generations 8 --temperature 0.7

All generate the same completions of the same prompts, epoch after epoch with other seeds, in
alternation and from a fresh memory in each round. The tokens must be equal. The line that is called
as `--lookahead` is under the controller, as in runs; `all` verifies every guess.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch

from posttrain.run.options import option, parse, plain_errors, say
from posttrain.run.settings import ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from posttrain.rollouts.lookahead import Lookahead
    from posttrain.rollouts.options import FindHeads


@dataclass(kw_only=True)
class Config:
    """Settings of the lookahead benchmark."""

    model: str = option("runs/quickstart/r1_zero/model", "folder, Hub name or GGUF file")
    lookahead: Literal["ngram", "heads", "auto"] = option("auto", "what guesses")
    dataset: str = option("data/problems.jsonl", "problems: file, folder or Hub name")
    template: str = option("r1_zero", "prompt format: r1_zero, chat, plain, …")
    dtype: str = option("float32", "number format: float32 or bfloat16")
    prompts: int = option(4, "prompts in an epoch", at_least=1)
    num_generations: int = option(8, "completions for each prompt", at_least=1)
    rows_at_once: int = option(128, "completions that are generated together", at_least=1)
    max_completion_length: int = option(128, "longest completion in tokens", at_least=1)
    temperature: float = option(1.0, "sampling temperature", at_least=0)
    epochs: int = option(2, "passes over the prompts in a round", at_least=1)
    rounds: int = option(3, "rounds; medians count", at_least=1)
    tree: int = option(63, "guesses of Medusa's published tree that are drafted", at_least=1)
    threads: int = option(1, "CPU threads", at_least=1)


@dataclass
class Taken:
    """What one way took in one epoch, round by round."""

    seconds: list[float] = field(default_factory=list)
    forwards: int = 0
    tokens: int = 0
    different: int = 0  # completions
    tokens_a_step: float = 1.0


def main(config: Config) -> list[dict]:
    """Measure, print a line for each epoch and way, and return them."""
    from posttrain.data import load_prompts
    from posttrain.data.encode import num_ids, stop_ids_of
    from posttrain.models.load import load_for_inference, load_tokenizer
    from posttrain.rollouts.sampling import Sampling
    from posttrain.run.engine import half_dtype

    torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(config.model)
    model = load_for_inference(ModelConfig(model_name_or_path=config.model, dtype="float32"))
    torch.set_num_threads(config.threads)
    rows = load_prompts(config.dataset, tokenizer, template=config.template, say=lambda _: None)
    prompts = rows.select(range(config.prompts))["prompt_ids"]
    stops = stop_ids_of(config.model, tokenizer)
    sampling = Sampling(
        config.max_completion_length, stops, config.temperature, vocabulary=num_ids(tokenizer)
    )
    half = half_dtype(config.dtype)
    with torch.autocast("cpu", half, enabled=half is not None):
        taken = measure(config, model, prompts, sampling)
    return [line(config, taken, *key) for key in sorted(taken, key=lambda key: key[1])]


def ways(config: Config, find_heads: FindHeads) -> dict[str, Lookahead | None]:
    """Return each way to decode, which has seen nothing yet."""
    from posttrain.rollouts.draft_length import Unlimited
    from posttrain.rollouts.options import lookahead_of
    from posttrain.rollouts.trees import PUBLISHED

    made = [lookahead_of(config.lookahead, find_heads) for _ in range(2)]
    made[1].controller = Unlimited()
    for lookahead in made:
        lookahead.tree = PUBLISHED[: config.tree]
    return {"plain": None, "chosen": made[0], "all": made[1]}


def measure(
    config: Config, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Any
) -> dict[tuple[str, int], Taken]:
    """Generate in all ways, in alternation; keys are ways and epochs."""
    from posttrain.models.beside import heads_beside
    from posttrain.rollouts.generator import HFGenerator, way_to_generate

    load = heads_beside(config.model)
    heads = load and load(model)  # once, as in a run

    def find_heads() -> Any:
        return heads and (lambda _: heads)

    way_to_generate(model)  # its probe is not measured, nor that of guesses
    for lookahead in ways(config, find_heads).values():
        HFGenerator(model, lookahead=lookahead).generate(prompts[:1], sampling, 1)
    forwards = [0]
    model.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    taken: dict[tuple[str, int], Taken] = {}
    for _ in range(config.rounds):
        fresh = ways(config, find_heads)
        for epoch in range(config.epochs):
            seeds, plain = [1000 * epoch + row for row in range(len(prompts))], None
            for name, lookahead in fresh.items():
                forwards[0], begun = 0, time.process_time()
                generator = HFGenerator(
                    model, lookahead=lookahead, rows_at_once=config.rows_at_once
                )
                found = generator.generate(prompts, sampling, config.num_generations, seeds=seeds)
                now = taken.setdefault((name, epoch), Taken())
                now.seconds.append(time.process_time() - begun)
                ids = [c.token_ids for siblings in found for c in siblings]
                plain = plain or ids
                now.forwards, now.tokens = forwards[0], sum(map(len, ids))
                now.different += sum(a != b for a, b in zip(ids, plain, strict=True))
                if lookahead and (rows := lookahead.counts["rows"]):
                    now.tokens_a_step = lookahead.counts["emitted"] / rows
    return taken


def line(config: Config, taken: dict[tuple[str, int], Taken], name: str, epoch: int) -> dict:
    """Print what a way took in an epoch, and return it."""
    now, plain = taken[name, epoch], taken["plain", epoch]
    seconds, rounds = median(now.seconds), [min(now.seconds), max(now.seconds)]
    speedup = median(plain.seconds) / seconds
    same = f"{now.different} completions differ" if now.different else "tokens equal"
    say(
        f"epoch {epoch}  {name if name != 'chosen' else config.lookahead:6} {seconds:8.2f} CPU s "
        f"({rounds[0]:.2f} to {rounds[1]:.2f})  {speedup:5.2f}x  {now.forwards:6} forwards  "
        f"{now.tokens_a_step:.2f} tokens a row and step  {now.tokens:,} tokens  {same}"
    )
    return {
        "way": name,
        "epoch": epoch,
        "cpu_seconds": seconds,
        "speedup": speedup,
        "forwards": now.forwards,
        "tokens": now.tokens,
        "tokens_a_step": now.tokens_a_step,
        "different": now.different,
    }


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
