"""Mix and split: rows of several sources into one file, and of one source into two.

    mix([Part("a.jsonl", 3), Part("b.jsonl", 1)], "mixed.jsonl", when_exhausted="stop")
    split(RowStream(["my.jsonl"]), "my.train.jsonl", "my.test.jsonl", test_fraction=0.05)

Each row of a mixture comes from a source chosen with its probability, and is that source's next row
in order. The same seed chooses the same rows. Shuffling inside a source is left to training.

A split keeps near-duplicates on one side: rows that repeat each other, directly or through others,
form a cluster, and a cluster goes to one side as a whole. The side depends only on a hash of the
cluster's texts and the seed, neither on the order of the rows nor on the other clusters: a file
that has grown keeps the sides of its old rows, unless a new row joins two clusters.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy

from posttrain.data.read import Row
from posttrain.errors import ConfigError, DataError
from posttrain.hygiene.duplicates import THRESHOLD, find_duplicates
from posttrain.hygiene.outputs import check_new, new_files
from posttrain.hygiene.rows import KeyPass, RowStream, text_hash

WhenExhausted = Literal["stop", "continue", "repeat"]
HASHES = 2**64  # number of values of text_hash


@dataclass
class Part:
    """A source, and its weight in proportion to the others' (above 0)."""

    source: str
    weight: float


@dataclass(frozen=True)
class PartResult:
    """A source's probability, its rows, and how many of them were written, repetitions included."""

    source: str
    probability: float
    num_rows: int
    num_written: int


def count_rows(source: str) -> int:
    """Number of rows in a file or Hub dataset."""
    return sum(1 for _ in RowStream([source]))


def tempered(sizes: Sequence[int], temperature: float) -> list[float]:
    """Weights n^(1/T) of sources of n rows (multilingual T5, arXiv 2010.11934, alpha = 1/T).

    temperature: 1 is in proportion to size; as it grows, all sources become equally frequent.
    By hand: `tempered([100, 400], 2) == [10, 20]`.
    """
    return [size ** (1 / temperature) for size in sizes]


def mix(
    parts: Sequence[Part],
    output: str,
    *,
    when_exhausted: WhenExhausted,
    num_rows: int | None = None,
    seed: int = 0,
    source_column: str = "source",
) -> list[PartResult]:
    """Write the mixture, and report for each part what was taken and what was left.

    Args:
        when_exhausted: "stop" ends with the first source that has no more rows: no row twice, and
            the weights hold throughout. "continue" goes on with the others until every row is
            written once. "repeat" begins a source again; it needs num_rows.
        num_rows: rows at most; None: until the sources end.
        source_column: column that gets the source's name; empty: none. A row that has it already is
            an error, for neither value may be lost.
    """
    if when_exhausted == "repeat" and num_rows is None:
        raise ConfigError("num_rows: expected a number of rows, as sources are repeated for ever.")
    taken = _Taken([part.source for part in parts], repeat=when_exhausted == "repeat")
    chooser = random.Random(seed)
    open_parts = list(range(len(parts)))
    with new_files(output) as (file,):
        while open_parts and file.count != num_rows:
            weights = [parts[place].weight for place in open_parts]
            place = chooser.choices(open_parts, weights)[0]
            row = taken.next_row(place)
            if row is not None:
                file.write(_named(row, parts[place].source, source_column), row.where)
            elif when_exhausted == "stop":
                break
            else:
                open_parts.remove(place)
    total = sum(part.weight for part in parts)
    return [
        PartResult(part.source, part.weight / total, taken.size(place), taken.counts[place])
        for place, part in enumerate(parts)
    ]


class _Taken:
    """The next row of each source, and the number of rows taken from it."""

    def __init__(self, sources: Sequence[str], *, repeat: bool) -> None:
        self.streams = [RowStream([source]) for source in sources]
        self.rows: list[Iterator[Row]] = [iter(stream) for stream in self.streams]
        self.counts = [0] * len(self.streams)
        self.sizes: list[int | None] = [None] * len(self.streams)
        self.repeat = repeat

    def next_row(self, place: int) -> Row | None:
        row = next(self.rows[place], None)
        if row is None and self.sizes[place] is None:
            self.sizes[place] = self.counts[place]
        if row is None and self.repeat:
            self.rows[place] = iter(self.streams[place])
            row = next(self.rows[place])
        self.counts[place] += row is not None
        return row

    def size(self, place: int) -> int:
        """Number of rows in the source; the ones not taken are read to the end."""
        if self.sizes[place] is None:
            self.sizes[place] = self.counts[place] + sum(1 for _ in self.rows[place])
        return self.sizes[place]


def _named(row: Row, source: str, column: str) -> dict[str, Any]:
    if not column:
        return row.values
    if column in row.values:
        raise DataError(
            f"{row.where}: has a column '{column}' already, which is not overwritten. Choose "
            "another source_column, or an empty one to leave the source out."
        )
    return {**row.values, column: source}


@dataclass(frozen=True)
class SplitResult:
    """Counts of rows; `largest_cluster` is the most rows that had to stay together."""

    num_train: int
    num_test: int
    num_clusters: int
    largest_cluster: int


def split(
    stream: RowStream,
    train_output: str,
    test_output: str,
    *,
    test_fraction: float,
    seed: int = 0,
    columns: Sequence[str] = (),
    threshold: float = THRESHOLD,
) -> SplitResult:
    """Write each row to one of two files, in order.

    Args:
        test_fraction: chance of a cluster to be for testing, in (0, 1); the share of rows is near
            it, unless a cluster is large.
        columns, threshold: what makes rows alike, as in deduplicate.

    Raises:
        DataError: if a side would be empty.
    """
    check_new([train_output, test_output])
    keys = KeyPass(stream, columns)
    found = find_duplicates(keys, threshold=threshold)
    clusters, sizes = numpy.unique(found.clusters(), return_inverse=True, return_counts=True)[1:]
    # The smallest hash in a cluster names it, in whatever order its rows come.
    names = numpy.full(len(sizes), HASHES - 1, numpy.uint64)
    numpy.minimum.at(names, clusters, found.hashes)
    is_test = [text_hash(f"{seed} {name}") < test_fraction * HASHES for name in names.tolist()]
    if all(is_test) or not any(is_test):
        side = "training" if all(is_test) else "testing"
        raise DataError(
            f"{stream.name}: no row is left for {side}; its {len(keys):,} rows form {len(sizes):,} "
            f"clusters of near-duplicates, the largest of {sizes.max():,}. Choose another "
            f"test_fraction (now {test_fraction}) or seed, or more data."
        )
    with new_files(train_output, test_output) as (train, test):
        for index, row in keys.again():
            (test if is_test[clusters[index]] else train).write(row.values, row.where)
    return SplitResult(train.count, test.count, len(sizes), int(sizes.max()))
