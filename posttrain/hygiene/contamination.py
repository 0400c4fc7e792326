"""Contamination: training rows that hold text of a benchmark.

    benchmark = Benchmark(RowStream(["gsm8k/test.jsonl"]))
    for row in RowStream(["train.jsonl"]): print(benchmark.overlap(row))

A row overlaps when any of its texts, the answers included, holds n words in a row that a benchmark
row's prompt side holds, whatever their case, punctuation and spacing (GPT-3, arXiv 2005.14165,
appendix C: n = 13). A benchmark text of fewer words has to be one of the row's texts as a whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from posttrain.data.read import Row
from posttrain.errors import DataError
from posttrain.hygiene.outputs import beside, new_files
from posttrain.hygiene.rows import RowStream, filled, key_of, text_hash, words_of

NUM_WORDS = 13
ODD = numpy.uint64(0x9E3779B97F4A7C15)
OVERLAP = "overlaps with a benchmark"


class Overlap(NamedTuple):
    """The benchmark row, the words shared with it, and the number of shared runs of words."""

    benchmark_row: str
    text: str
    num_places: int


class Benchmark:
    """The runs of `num_words` words in rows of benchmark files, and their short texts.

    Takes 16 bytes a word of the benchmark. Raises DataError for a benchmark without any text.
    """

    def __init__(
        self, stream: RowStream, *, columns: Sequence[str] = (), num_words: int = NUM_WORDS
    ) -> None:
        self.num_words = num_words
        self.rows: list[str] = []
        self._whole: dict[int, int] = {}  # hash of a short text -> its row
        runs, owners = [], []
        for place, row in enumerate(stream):
            self.rows.append(row.where)
            words = words_of(key_of(row, columns).text)
            if 0 < len(words) < num_words:
                self._whole.setdefault(_whole_hash(words), place)
            hashes = self._run_hashes(words)
            runs.append(hashes)
            owners.append(numpy.full(len(hashes), place))
        if not self._whole and not sum(map(len, runs)):
            raise DataError(f"{stream.name}: no text to compare with. Name its column.")
        self._runs, first = numpy.unique(numpy.concatenate(runs), return_index=True)
        self._owners = numpy.concatenate(owners)[first]

    def overlap(self, row: Row, columns: Sequence[str] = ()) -> Overlap | None:
        """The row's first overlap; None if there is none. columns: those searched; none: all."""
        for text in _texts(filled(row, columns) if columns else row.values):
            found = self._overlap_of(words_of(text))
            if found is not None:
                return found
        return None

    def _overlap_of(self, words: list[str]) -> Overlap | None:
        if not words:
            return None
        if len(words) < self.num_words:
            owner = self._whole.get(_whole_hash(words))
            return None if owner is None else Overlap(self.rows[owner], " ".join(words), 1)
        if not len(self._runs):
            return None
        hashes = self._run_hashes(words)
        places = numpy.minimum(numpy.searchsorted(self._runs, hashes), len(self._runs) - 1)
        shared = numpy.flatnonzero(self._runs[places] == hashes)
        if not len(shared):
            return None
        gaps = numpy.flatnonzero(numpy.diff(shared) > 1)
        end = shared[gaps[0]] if len(gaps) else shared[-1]
        owner = self._owners[places[shared[0]]]
        text = " ".join(words[shared[0] : end + self.num_words])
        return Overlap(self.rows[owner], text, len(shared))

    def _run_hashes(self, words: list[str]) -> numpy.ndarray:
        """A polynomial in the hashes of the words, for each run of `num_words`."""
        count = max(0, len(words) - self.num_words + 1)
        codes = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words]
        hashes = numpy.array(codes, numpy.uint64)
        runs = numpy.zeros(count, numpy.uint64)
        for place in range(self.num_words if count else 0):
            runs = runs * ODD + hashes[place : place + count]
        return runs


@dataclass
class ContaminationResult:
    """Counts of rows; benchmark_rows: the benchmark's rows that were met -> rows that met them."""

    num_rows: int
    num_benchmark_rows: int
    num_overlapping: int
    benchmark_rows: dict[str, int]

    def count(self, overlap: Overlap | None) -> None:
        """Count one row, by its overlap."""
        self.num_rows += 1
        if overlap is not None:
            met = self.benchmark_rows.get(overlap.benchmark_row, 0)
            self.num_overlapping += 1
            self.benchmark_rows[overlap.benchmark_row] = met + 1


def decontaminate(
    stream: RowStream,
    benchmark: Benchmark,
    output: str | None = None,
    *,
    columns: Sequence[str] = (),
    show: Callable[[Row, Overlap], None] | None = None,
) -> ContaminationResult:
    """Find the rows that overlap; with `output`, write the others there.

    The overlapping ones are then written beside (`.removed.jsonl`), with the reason.

    Args:
        output: a new .jsonl file; None writes nothing.
        columns: the columns that are searched; none: all texts of a row.
        show: called with each overlapping row and its overlap.
    """
    paths = [output, beside(output, "removed")] if output else []
    result = ContaminationResult(0, len(benchmark.rows), 0, {})
    with new_files(*paths) as files:
        kept_file, removed_file = files or (None, None)
        for row in stream:
            overlap = benchmark.overlap(row, columns)
            result.count(overlap)
            if overlap is not None and show is not None:
                show(row, overlap)
            if kept_file and overlap is None:
                kept_file.write(row.values, row.where)
            elif removed_file and overlap is not None:
                removed_file.write(_removed(row, overlap), row.where)
    return result


def _removed(row: Row, overlap: Overlap) -> dict[str, Any]:
    return {
        "reason": OVERLAP,
        "file": row.file,
        "row": row.number,
        "benchmark_row": overlap.benchmark_row,
        "overlap": overlap.text,
        "record": row.values,
    }


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _whole_hash(words: list[str]) -> int:
    return text_hash("\0".join(words))
