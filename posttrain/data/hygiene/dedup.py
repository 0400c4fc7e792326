"""Rows without their duplicates.

    result = deduplicate(RowStream(["my.jsonl"]), "my.unique.jsonl")

Writes the rows that stay in their order, what was removed beside them (`my.unique.removed.jsonl`),
each with its reason and the row that stays for it, and the clusters (`my.unique.clusters.jsonl`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from posttrain.data.hygiene.duplicates import THRESHOLD, Duplicates, find_duplicates
from posttrain.data.hygiene.key_pass import KeyPass
from posttrain.data.hygiene.outputs import JsonLines, beside, check_new, new_files
from posttrain.data.hygiene.rows import RowStream

EXACT, NEAR = "exact duplicate", "near duplicate"


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

    columns: what is compared; none: the prompt side (keys.py). threshold, near: duplicates.py.
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
