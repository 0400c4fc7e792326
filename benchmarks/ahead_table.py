"""Medusa's table made again: tokens a forward gains, by number of heads and shape of the draft.

    python -m benchmarks.ahead_table --model runs/medusa/model --template chat \\
        --dataset gsm8k/test.jsonl --temperature 0.7

Whether a guess is right depends on the completion and on the heads alone, so the completions are
sampled plainly, once, and the drafts of all places are compared with what followed. Half of the
prompts measure how often each rank is right, from which trees are optimised; the table is of the
other half. The cost of a forward of so many tokens, against one token, is measured beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.plot import lines_plot
from posttrain.run.options import option, parse, plain_errors, say
from posttrain.run.settings import ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from posttrain.rollouts.drafts import Draft, Row

SIZES = (4, 8, 16, 32, 63)  # guesses of optimised trees
RANKS = 10


@dataclass(kw_only=True)
class Config:
    """Settings of the table."""

    model: str = option("runs/lookahead/model", "folder with Medusa heads beside the model")
    dataset: str = option("data/problems.jsonl", "problems: file, folder or Hub name")
    template: str = option("r1_zero", "prompt format: r1_zero, chat, plain, …")
    prompts: int = option(24, "prompts, half of them to choose trees by", at_least=2)
    max_completion_length: int = option(96, "longest completion in tokens", at_least=1)
    temperature: float = option(1.0, "sampling temperature", at_least=0)
    plot: str | None = option(None, "SVG file of the plot")


def main(config: Config) -> None:
    """Print the table, and write the plot."""
    from posttrain.data import load_prompts
    from posttrain.data.encode import num_ids, stop_ids_of
    from posttrain.heads import load_heads
    from posttrain.models.load import load_for_inference, load_tokenizer
    from posttrain.rollouts.sampling import Sampling
    from posttrain.rollouts.trees import PUBLISHED, cut, optimised_tree

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(config.model)
    model = load_for_inference(ModelConfig(model_name_or_path=config.model, dtype="float32"))
    torch.set_num_threads(1)
    data = load_prompts(config.dataset, tokenizer, template=config.template, say=lambda _: None)
    prompts = data.select(range(config.prompts))["prompt_ids"]
    stops = stop_ids_of(config.model, tokenizer)
    sampling = Sampling(
        config.max_completion_length, stops, config.temperature, vocabulary=num_ids(tokenizer)
    )
    heads = load_heads(config.model, model)
    texts = sampled(model, heads, prompts, sampling)
    known, asked = texts[::2], texts[1::2]
    accuracy = rank_accuracy(heads, known, sampling)
    for depth, shares in enumerate(accuracy, 1):
        say(f"head {depth}: right by rank " + " ".join(f"{share:.3f}" for share in shares[:6]))
    trees: dict[str, list] = {"chain": [], "published tree": []}
    for depth in range(1, heads.depth + 1):
        trees["chain"].append([(0,) * (n + 1) for n in range(depth)])
        trees["published tree"].append(cut(PUBLISHED, depth))
        for size in SIZES:
            tree = optimised_tree(accuracy[:depth], size)[0]
            trees.setdefault(f"tree of {size}", []).append(tree)
    gains = {n: [gain(heads, tree, asked, sampling) for tree in made] for n, made in trees.items()}
    for name, found in gains.items():
        say(f"| {name} | " + " | ".join(f"{tokens:.2f}" for tokens in found) + " |")
    costs = forward_costs(model, prompts[0], [1 + size for size in (0, heads.depth, *SIZES)])
    say("cost    " + "  ".join(f"{n} tokens {cost:.2f}" for n, cost in costs.items()))
    if config.plot:
        depths = range(1, heads.depth + 1)
        curves = {name: list(zip(depths, found, strict=True)) for name, found in gains.items()}
        picture = lines_plot(curves, across="Medusa heads", up="tokens a row gains in a forward")
        Path(config.plot).write_text(picture, encoding="utf-8")


@torch.no_grad()
def sampled(model: nn.Module, heads: Any, prompts: Sequence, sampling: Any) -> list[tuple]:
    """For each prompt the row of its completion and the states that predicted its tokens."""
    from posttrain.rollouts.drafts import Row
    from posttrain.rollouts.generator import HFGenerator
    from posttrain.rollouts.sampling import uniforms

    seeds = range(len(prompts))
    groups = HFGenerator(model).generate(prompts, sampling, 1, seeds=seeds)
    noise, found = uniforms(seeds, 1, sampling.max_tokens).tolist(), []
    for number, (prompt, (completion,)) in enumerate(zip(prompts, groups, strict=True)):
        ids = completion.token_ids
        (states,) = heads.prompt_states([[*prompt, *ids]])
        found.append(
            (Row(number, tuple(prompt), noise[number], number, ids), states[len(prompt) - 1 : -1])
        )
    return found


def drafts_of(heads: Any, tree: Sequence, text: tuple[Row, Any], sampling: Any) -> list[Draft]:
    """The draft of each place of a completion; the first is of what follows its first token."""
    from posttrain.rollouts.drafts import HeadDrafter, Row

    row, states = text
    drafter = HeadDrafter(heads, tree)
    drafter.begin([row.prompt], sampling)
    places = [
        Row(n, row.prompt, row.uniforms, 0, row.ids[: n + 1]) for n in range(len(row.ids) - 1)
    ]
    depth = max(map(len, tree))
    return drafter.propose(places, depth, states[: len(places)]) if places else []


def accepted(draft: Draft, follows: Sequence[int]) -> list[int]:
    """Places of the guesses that are what follows."""
    path = [0]
    for index, token in enumerate(draft.token_ids):
        depth = len(path) - 1
        if draft.parent(index) == path[-1] and depth < len(follows) and token == follows[depth]:
            path.append(index + 1)
    return path[1:]


def rank_accuracy(heads: Any, texts: Sequence, sampling: Any) -> list[list[float]]:
    """For each head the share of places whose token it has at each rank."""
    right = torch.zeros(heads.depth, RANKS)
    counts = torch.zeros(heads.depth, 1)
    # A star: all ranks of the first head, and below rank 0 all of the next, and so on.
    tree = [(*(0,) * depth, rank) for depth in range(heads.depth) for rank in range(RANKS)]
    for text in texts:
        for place, draft in enumerate(drafts_of(heads, tree, text, sampling), 1):
            follows = text[0].ids[place : place + heads.depth]
            by_depth = [draft.token_ids[d * RANKS : (d + 1) * RANKS] for d in range(len(follows))]
            for depth, (ranked, token) in enumerate(zip(by_depth, follows, strict=True)):
                counts[depth] += 1
                if token in ranked:
                    right[depth, ranked.index(token)] += 1
    return (right / counts.clamp(min=1)).tolist()


def gain(heads: Any, tree: Sequence, texts: Sequence, sampling: Any) -> float:
    """Tokens that a forward gains, the prompts' own left out."""
    tokens = forwards = 0
    for text in texts:
        drafts, ids = drafts_of(heads, tree, text, sampling), text[0].ids
        place = 1
        while place < len(ids):
            gained = 1 + len(accepted(drafts[place - 1], ids[place:]))
            gained = min(gained, len(ids) - place)
            place, tokens, forwards = place + gained, tokens + gained, forwards + 1
    return tokens / max(1, forwards)


@torch.no_grad()
def forward_costs(
    model: nn.Module, prompt: Sequence[int], sizes: Sequence[int]
) -> dict[int, float]:
    """CPU seconds of a forward of so many tokens of one row, over those of one token."""
    from posttrain.packed.ahead import Ahead, Feed
    from posttrain.packed.forward import in_evaluation
    from posttrain.packed.half import fixed_weights
    from posttrain.rollouts.ahead_decoding import AheadDecoding
    from posttrain.rollouts.draft_length import Unlimited
    from posttrain.rollouts.lookahead import Lookahead
    from posttrain.rollouts.sampling import Sampling

    ahead = Lookahead("ngram", [], controller=Unlimited())
    ahead.spare_slots = max(sizes)
    with in_evaluation(model), fixed_weights(model):
        decoding = AheadDecoding(ahead, model, [prompt], [0], Sampling(1, ()), None)
        seconds: dict[int, list[float]] = {}
        for _ in range(7):
            for size in sizes:
                feed = Feed(0, 0, len(prompt), [prompt[-1]] * size)
                begun = time.process_time()
                decoding._forward(Ahead.of([feed], 1, decoding.device))
                seconds.setdefault(size, []).append(time.process_time() - begun)
    least = {size: sorted(found)[2] for size, found in seconds.items()}
    return {size: found / least[sizes[0]] for size, found in least.items()}


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
