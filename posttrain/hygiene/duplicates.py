"""Duplicates: rows that repeat an earlier one, to the letter, in other dress, or but for a word.

    result = deduplicate(RowStream(["my.jsonl"]), "my.unique.jsonl")

writes the rows that stay in their order, what was removed beside them (`my.unique.removed.jsonl`),
each with its reason and the row that stays for it, and the clusters (`my.unique.clusters.jsonl`).

    found = find_duplicates(keys)
    found.kept[7] == 2        # text 7 repeats text 2, which stays
    found.clusters()[7]       # the smallest place that text 7 is connected with, directly or not

What counts in a text when texts are compared stands in rows.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from posttrain.hygiene.minhash import SimilarPairs, Sketches
from posttrain.hygiene.outputs import JsonLines, beside, check_new, new_files
from posttrain.hygiene.rows import Key, KeyPass, RowStream, text_hash, words_of

EXACT, NEAR = "exact duplicate", "near duplicate"
THRESHOLD = 0.6  # a text of seven words still counts as the same when one of them is exchanged


@dataclass(frozen=True)
class DedupResult:
    """Counts of rows; `num_rows == num_kept + num_exact + num_near`."""

    num_rows: int
    num_kept: int
    num_exact: int
    num_near: int
    num_clusters: int


def deduplicate(
    stream: RowStream,
    output: str,
    *,
    columns: Sequence[str] = (),
    threshold: float = THRESHOLD,
    near: bool = True,
) -> DedupResult:
    """Write the rows of `stream` without duplicates; of each cluster the first row stays.

    Args:
        output: a new .jsonl file.
        columns: the columns that are compared; none: the prompt side.
        threshold, near: as in find_duplicates.
    """
    paths = [output, beside(output, "removed"), beside(output, "clusters")]
    check_new(paths)
    keys = KeyPass(stream, columns)
    found = find_duplicates(keys, threshold=threshold, near=near)
    removed = numpy.flatnonzero(found.kept != numpy.arange(len(keys)))
    heads = numpy.unique(found.kept[removed])
    with new_files(*paths) as (kept_file, removed_file, clusters_file):
        for index, row in keys.again():
            if found.kept[index] == index:
                kept_file.write(row.values, row.where)
            else:
                reason = _reason(found, keys, index)
                cluster = int(numpy.searchsorted(heads, found.kept[index])) + 1
                record = {**reason, "cluster": cluster, "record": row.values}
                removed_file.write(record, row.where)
        _write_clusters(clusters_file, found, keys, removed)
    num_exact = int(sum(found.is_exact(place) for place in removed))
    return DedupResult(
        num_rows=len(keys),
        num_kept=kept_file.count,
        num_exact=num_exact,
        num_near=len(removed) - num_exact,
        num_clusters=len(heads),
    )


def _reason(found: Duplicates, keys: KeyPass, index: int) -> dict[str, Any]:
    kept = keys.place(found.kept[index])
    return {
        "reason": EXACT if found.is_exact(index) else NEAR,
        "similarity": round(float(found.similarity[index]), 3),
        **keys.place(index),
        "kept_file": kept["file"],
        "kept_row": kept["row"],
    }


def _write_clusters(
    file: JsonLines, found: Duplicates, keys: KeyPass, removed: numpy.ndarray
) -> None:
    by_head = removed[numpy.argsort(found.kept[removed], kind="stable")]
    edges = numpy.flatnonzero(numpy.diff(found.kept[by_head])) + 1
    groups = numpy.split(by_head, edges) if len(by_head) else []
    for number, members in enumerate(groups, start=1):
        rows = [
            {**keys.place(place), "similarity": round(float(found.similarity[place]), 3)}
            for place in members
        ]
        head = keys.place(found.kept[members[0]])
        file.write({"cluster": number, "kept": head, "removed": rows}, f"cluster {number}")


def find_duplicates(
    keys: Iterable[Key], *, threshold: float = THRESHOLD, near: bool = True
) -> Duplicates:
    """Duplicates among the keys, in one pass over them.

    Args:
        threshold: similarity (minhash.py) from which on two texts are the same; above 0, up to 1.
        near: False finds only texts that are the same to the letter.
    """
    sketches = Sketches()
    hashes, original = array("Q"), array("q")
    first_of: dict[int, int] = {}  # hash of a form -> the first text that has it
    originals: list[int] = []
    for place, key in enumerate(keys):
        hashes.append(key.hash)
        if not near:
            original.append(first_of.setdefault(hashes[-1], place))
            continue
        words = words_of(key.text) or [key.text]  # what has no words equals only itself
        form = text_hash("\0".join([key.guard, *words]))
        original.append(first_of.setdefault(form, place))
        if original[-1] == place:
            sketches.add(words, key.guard)
            originals.append(place)
    pairs = sketches.similar_pairs(threshold)
    places = numpy.array(originals, numpy.int64)
    pairs = SimilarPairs(places[pairs.earlier], places[pairs.later], pairs.similarity)
    return Duplicates(numpy.array(hashes), numpy.array(original), pairs)


@dataclass
class Duplicates:
    """The duplicates among texts, which are named by their place in the order.

    hashes: of each text's key. original: for each text the first one of the same words, digits and
    signs, itself if there is none. pairs: originals that are similar. kept: for each text the one
    that stays for it, itself if it stays. similarity: that of each text and the one that stays.
    """

    hashes: numpy.ndarray
    original: numpy.ndarray
    pairs: SimilarPairs

    def __post_init__(self) -> None:
        self.kept, self.similarity = self._keep_first()

    def is_exact(self, place: int) -> bool:
        """True if the text and the one that stays for it are the same to the letter."""
        return self.hashes[place] == self.hashes[self.kept[place]]

    def _keep_first(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Compute `kept` and `similarity`.

        A text goes only if it is itself similar to one that stays: a chain of small changes does
        not make its two ends the same.
        """
        kept = numpy.arange(len(self.original))
        similarity = numpy.ones(len(self.original))
        for earlier, later, value in zip(*(column.tolist() for column in self.pairs), strict=True):
            stays = kept[earlier] == earlier
            is_nearer = kept[later] == later or value > similarity[later]
            if stays and is_nearer:
                kept[later], similarity[later] = earlier, value
        return kept[self.original], similarity[self.original]

    def clusters(self) -> numpy.ndarray:
        """The first text of each text's cluster; similar texts are in the same one."""
        parent = numpy.arange(len(self.original))
        pairs = zip(self.pairs.earlier.tolist(), self.pairs.later.tolist(), strict=True)
        for earlier, later in pairs:
            first, second = sorted((_root_of(parent, earlier), _root_of(parent, later)))
            parent[second] = first
        roots = numpy.array([_root_of(parent, place) for place in range(len(parent))], numpy.int64)
        return roots[self.original]


def _root_of(parent: numpy.ndarray, place: int) -> int:
    """The root of a union-find tree; halves the path on the way, for the next search."""
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = parent[place]
    return place
