"""A training and a test file, with near-duplicates on one side.

    split(RowStream(["my.jsonl"]), "my.train.jsonl", "my.test.jsonl", test_fraction=0.05)

Rows that repeat each other, directly or through others, form a cluster, and a cluster goes to one
side as a whole. Which side hangs on a hash of its texts and the seed alone, neither on the order of
the rows nor on the other clusters: a file that has grown keeps the sides of its old rows, unless a
new row joins two clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from posttrain.data.hygiene.duplicates import THRESHOLD, find_duplicates
from posttrain.data.hygiene.key_pass import KeyPass
from posttrain.data.hygiene.outputs import check_new, new_files
from posttrain.data.hygiene.rows import RowStream, text_hash
from posttrain.errors import DataError

HASHES = 2**64


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

    test_fraction: chance of a cluster to be for testing, in (0, 1); the share of rows is near it,
    unless a cluster is large. columns, threshold: what makes rows alike, as in dedup.

    Raises DataError when a side would be empty.
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
