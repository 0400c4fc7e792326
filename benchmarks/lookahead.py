"""Compare decoding with guesses to plain decoding, in CPU seconds of one thread.

    python -m benchmarks.lookahead --model runs/quickstart/r1_zero/model
    python -m benchmarks.lookahead --model SmolLM2-135M-Instruct.Q4_1.gguf --template chat \\
        --dataset gsm8k/train.jsonl --prompts 4 --num_generations 8 --temperature 0.7

Both generate the same completions of the same prompts, epoch after epoch with other seeds, in
alternation and from a fresh memory in each round. The tokens must be equal. `auto` rows are under
the controller as runs have it; `all` verifies every guess.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from posttrain.run.options import option, parse, plain_errors, say
from posttrain.run.settings import ModelConfig


@dataclass(kw_only=True)
class Config:
    """Settings of the lookahead benchmark."""

    model: str = option("runs/quickstart/r1_zero/model", "folder, Hub name or GGUF file")
    dataset: str = option("data/problems.jsonl", "problems: file, folder or Hub name")
    template: str = option("r1_zero", "prompt format: r1_zero, chat, plain, …")
    prompts: int = option(4, "prompts in an epoch", at_least=1)
    num_generations: int = option(8, "completions for each prompt", at_least=1)
    max_completion_length: int = option(128, "longest completion in tokens", at_least=1)
    temperature: float = option(1.0, "sampling temperature", at_least=0)
    epochs: int = option(2, "passes over the prompts in a round", at_least=1)
    rounds: int = option(3, "rounds; medians count", at_least=1)
    threads: int = option(1, "CPU threads", at_least=1)


def main(config: Config) -> list[dict]:
    """Measure, print a line for each epoch, and return them."""
    from posttrain.data import load_prompts
    from posttrain.data.encode import num_ids, stop_ids_of
    from posttrain.models.load import load_for_inference, load_tokenizer
    from posttrain.rollouts.draft_length import Unlimited
    from posttrain.rollouts.drafts import NGramDrafter
    from posttrain.rollouts.generator import HFGenerator, way_to_generate
    from posttrain.rollouts.lookahead import Lookahead
    from posttrain.rollouts.sampling import Sampling

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
    way_to_generate(model)  # its probe is not measured, nor that of guesses
    HFGenerator(model, lookahead=Lookahead("ngram", [NGramDrafter()])).generate(
        prompts[:1], sampling, 1
    )
    taken: dict[tuple[str, int], list[float]] = {}
    for _ in range(config.rounds):
        ways = {
            "plain": None,
            "auto": Lookahead("auto", [NGramDrafter()]),
            "all": Lookahead("ngram", [NGramDrafter()], controller=Unlimited()),
        }
        for epoch in range(config.epochs):
            ids: dict[str, Sequence] = {}
            seeds = [1000 * epoch + row for row in range(len(prompts))]
            for name, lookahead in ways.items():
                begun = time.process_time()
                found = HFGenerator(model, lookahead=lookahead).generate(
                    prompts, sampling, config.num_generations, seeds=seeds
                )
                taken.setdefault((name, epoch), []).append(time.process_time() - begun)
                ids[name] = [c.token_ids for siblings in found for c in siblings]
                different = sum(a != b for a, b in zip(ids[name], ids["plain"], strict=True))
                if different:
                    say(
                        f"{name}, epoch {epoch}: {different} of {len(ids[name])} completions differ"
                    )
    results = []
    for (name, epoch), seconds in sorted(taken.items(), key=lambda entry: entry[0][1]):
        ratio = median(taken["plain", epoch]) / median(seconds)
        line = {"way": name, "epoch": epoch, "cpu_seconds": median(seconds), "speedup": ratio}
        line["tokens"] = sum(map(len, ids["plain"]))
        results.append(line)
        say(f"epoch {epoch}  {name:6} {median(seconds):8.2f} s   {ratio:.2f}x   "
            f"{min(seconds):.2f} to {max(seconds):.2f}")  # fmt: skip
    for name in ("auto", "all"):
        counts = ways[name].counts
        say(f"{name}: {counts['emitted'] / max(1, counts['rows']):.2f} tokens a row and step, "
            f"{counts['guesses']} guesses; {ways[name].controller.cost}")  # fmt: skip
    return results


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
