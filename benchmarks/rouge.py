"""Comparison of instructions: pairs per CPU second, and 52,000 of them filtered one by one.

    python benchmarks/rouge.py
    python benchmarks/rouge.py --texts my_instructions.jsonl

Without --texts the instructions are recombined from the shipped seeds, with a quarter of the words
exchanged: lengths and repetitions as in Alpaca's data, and most of them new.
Everything runs in one process on one thread; CPU seconds are the process's own.
"""

import random
import resource
import sys
import time
from dataclasses import dataclass

import numpy
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from posttrain.data import read_records
from posttrain.run.options import option, parse, plain_errors
from posttrain.self_instruct.rouge import NoveltyPool, rouge_tokens

SOURCE = "data/seed_tasks.jsonl"
EXCHANGED_SHARE = 0.25
LONGEST_HALF = 14  # words
BYTES_PER_MAXRSS = 1 if sys.platform == "darwin" else 1024


@dataclass(kw_only=True)
class Config:
    """Settings of the ROUGE benchmark."""

    texts: str | None = option(None, "file with a column 'instruction'; none: made up")
    num_texts: int = option(52_000, "instructions to filter", at_least=1)
    num_plain: int = option(
        2_000, "instructions compared each with each, without bounds", at_least=1
    )
    threshold: float = option(0.7, "ROUGE-L F1 above which one is rejected", at_least=0)
    seed: int = option(0, "seed of the made-up instructions")


def main(config: Config) -> None:
    """Measure the plain comparison and the filter, and print both."""
    texts = load_texts(config)
    lengths = sorted(len(rouge_tokens(text)) for text in texts)
    print(f"{len(texts):,} instructions, {lengths[len(lengths) // 2]} tokens in the median")
    compare_plainly(texts[: config.num_plain])
    filter_in_turn(texts, config.threshold)


def compare_plainly(texts: list[str]) -> None:
    """Compare each with each by rapidfuzz: the cost of a pair that no bound rules out."""
    codes: dict[str, str] = {}
    strings = [
        "".join(codes.setdefault(token, chr(len(codes))) for token in rouge_tokens(text))
        for text in texts
    ]
    others = list(strings)  # of one and the same list rapidfuzz would compute half
    start = time.process_time()
    process.cdist(strings, others, scorer=LCSseq.similarity, dtype=numpy.int32)
    seconds = time.process_time() - start
    print(f"each pair compared: {len(texts) ** 2 / seconds / 1e6:,.0f} million pairs a CPU-second")


def filter_in_turn(texts: list[str], threshold: float) -> None:
    """Filter as a run does: compare each with all that were kept before."""
    pool, num_pairs = NoveltyPool(threshold=threshold), 0
    start = time.process_time()
    for text in texts:
        num_pairs += len(pool)
        if pool.too_similar(text) is None:
            pool.add(text)
    seconds = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES_PER_MAXRSS / 1e9
    print(
        f"filtered in turn: {len(texts):,} in {seconds:.1f} CPU seconds, {len(pool):,} kept, "
        f"{num_pairs / seconds / 1e6:,.0f} million pairs a CPU-second, {memory:.2f} GB at most"
    )


def load_texts(config: Config) -> list[str]:
    """Read the instructions, or make them up."""
    if config.texts:
        return [row.text("instruction") for row in read_records(config.texts)][: config.num_texts]
    dice = random.Random(config.seed)
    base = [row.text("instruction").split() for row in read_records(SOURCE)]
    words = [word for text in base for word in text]
    return [recombined(base, words, dice) for _ in range(config.num_texts)]


def recombined(base: list[list[str]], words: list[str], dice: random.Random) -> str:
    """Join the beginning of one seed and the end of another, with some words exchanged."""
    first, second = dice.choice(base), dice.choice(base)
    text = first[: dice.randint(2, LONGEST_HALF)] + second[-dice.randint(2, LONGEST_HALF) :]
    return " ".join(dice.choice(words) if dice.random() < EXCHANGED_SHARE else w for w in text)


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
