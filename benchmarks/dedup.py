"""Deduplication: its speed, its memory, and the share of planted duplicates that it finds.

    python benchmarks/dedup.py                          100,000 made-up instructions
    python benchmarks/dedup.py --num_rows 1000000
    python benchmarks/dedup.py --template_share 1       each a filling of a few hundred templates

Instructions are recombined from the shipped seeds, with a quarter of the words exchanged; one row
in ten repeats an earlier one in other dress: two neighbouring words swapped, another case, other
punctuation, or one word exchanged. Everything runs in one process on one thread.
"""

import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.data import read_records
from posttrain.hygiene.duplicates import deduplicate
from posttrain.hygiene.rows import RowStream
from posttrain.run.options import option, parse, plain_errors

SOURCE = "data/seed_tasks.jsonl"
PLANTED_SHARE = 0.1
EXCHANGED_SHARE = 0.25
BYTES_PER_MAXRSS = 1 if sys.platform == "darwin" else 1024


@dataclass(kw_only=True)
class Config:
    """Settings of the deduplication benchmark."""

    num_rows: int = option(100_000, "rows to write and free of duplicates", at_least=1)
    template_share: float = option(
        0.0, "share of rows that fill a seed's last two words in", at_least=0, at_most=1
    )
    seed: int = option(0, "seed of the made-up rows")


def main(config: Config) -> None:
    """Make rows, deduplicate them, and print time, memory and the share of planted ones found."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        with source.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(config))
        wall, cpu = time.monotonic(), time.process_time()
        result = deduplicate(RowStream([source]), str(Path(folder) / "kept.jsonl"))
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        planted, found = count_planted(source, Path(folder) / "kept.removed.jsonl")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES_PER_MAXRSS / 1e9
    print(result)
    print(f"{cpu:.1f} CPU seconds, {wall:.1f} seconds, {memory:.2f} GB at most")
    for kind, count in planted.items():
        print(f"planted, {kind}: {found[kind]:,} of {count:,} found ({found[kind] / count:.1%})")


def rows(config: Config) -> Iterator[dict]:
    """Yield the made-up rows; a planted one names its kind and the row that it repeats."""
    dice = random.Random(config.seed)
    seeds = [row.text("instruction").split() for row in read_records(SOURCE)]
    words = [word for text in seeds for word in text]
    recent: list[tuple[int, list[str]]] = []
    for number in range(config.num_rows):
        kind, repeated = "", None
        if recent and dice.random() < PLANTED_SHARE:
            kind = dice.choice(list(PLANTS))
            repeated, text = dice.choice(recent)
            text = PLANTS[kind](text, words, dice)
        else:
            text = original(seeds, words, dice, dice.random() < config.template_share)
            recent = [*recent[-999:], (number, text)]
        yield {"instruction": " ".join(text), "output": str(number), "kind": kind, "of": repeated}


def original(seeds: list[list[str]], words: list[str], dice: random.Random, filled: bool):
    """Make the words of a new row, or fill a seed's last two words in."""
    if filled:
        return [*dice.choice(seeds)[:-2], dice.choice(words), dice.choice(words)]
    text = dice.choice(seeds) + dice.choice(seeds)
    return [dice.choice(words) if dice.random() < EXCHANGED_SHARE else word for word in text]


def swapped(text: list[str], _words: list[str], dice: random.Random) -> list[str]:
    """Swap two neighbouring words."""
    place = dice.randrange(max(1, len(text) - 1))
    return [*text[:place], *reversed(text[place : place + 2]), *text[place + 2 :]]


def exchanged(text: list[str], words: list[str], dice: random.Random) -> list[str]:
    """Exchange one word, which is no number, for another that is no number either."""
    place = dice.choice([i for i, word in enumerate(text) if word.isalpha()] or [0])
    return [*text[:place], dice.choice([w for w in words if w.isalpha()]), *text[place + 1 :]]


PLANTS = {
    "words swapped": swapped,
    "case": lambda text, _words, dice: [dice.choice([w.upper(), w.title()]) for w in text],
    "punctuation": lambda text, _words, dice: [w.strip(".,:?!") + dice.choice(",.!") for w in text],
    "one word exchanged": exchanged,
}


def count_planted(source: Path, removed: Path) -> tuple[Counter, Counter]:
    """Count planted rows by kind, and those of which the row or the one it repeats is removed."""
    gone = {row.values["row"] - 1 for row in RowStream([removed])}
    planted, found = Counter(), Counter()
    for number, row in enumerate(RowStream([source])):
        if kind := row.values["kind"]:
            planted[kind] += 1
            found[kind] += number in gone or row.values["of"] in gone
    return planted, found


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
