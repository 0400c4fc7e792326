"""Rows of files too large for memory, read one after the other, as often as needed.

    stream = RowStream(["data/a.jsonl", "data/b.parquet"])
    for row in stream: ...

JSONL, CSV and parquet are read row by row and in blocks; a `.json` list has to be read whole.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from posttrain.data.files import READERS, suffix_of
from posttrain.data.formats import FORMATS, Format
from posttrain.data.records import Records, Row, read_records
from posttrain.errors import DataError


class RowStream:
    """The rows of files or Hub datasets, in order; each iteration reads them anew.

    Raises DataError for a source that is missing, a folder, or of no known type; while read, for
    one that is broken or has no rows.
    """

    def __init__(self, sources: Sequence[str | Path]) -> None:
        self.sources = [_opened(source) for source in sources]
        self.name = ", ".join(map(str, sources))

    def __iter__(self) -> Iterator[Row]:
        row = None
        for source in self.sources:
            for row in source if isinstance(source, Records) else _rows_of(source):
                yield row
        if row is None:
            raise DataError(f"{self.name}: no rows. The file is empty.")


def _opened(source: str | Path) -> Path | Records:
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(
            f"{source}: a folder; expected files, so that it is clear which splits are meant. "
            f"Name them, as in {path}/*.jsonl."
        )
    if not path.exists():
        return read_records(source)  # of the Hub: memory-mapped
    if suffix_of(path) not in READERS:
        raise DataError(
            f"{path}: cannot tell the file type from its name. Known: {', '.join(READERS)}."
        )
    return path


def _rows_of(path: Path) -> Iterator[Row]:
    for number, values in READERS[suffix_of(path)](path):
        yield Row(values, str(path), number)


def format_of(row: Row) -> Format:
    """The first format in FORMATS whose columns the row fills; DataError when there is none."""
    filled = {name for name, value in row.values.items() if value is not None}
    for entry in FORMATS:
        if filled.issuperset(entry.columns):
            return entry
    known = "; ".join(f"{' + '.join(entry.columns)} ({entry.name})" for entry in FORMATS)
    raise DataError(
        f"{row.where}: filled columns {', '.join(sorted(filled)) or 'none'} make no known format. "
        f"Known: {known}."
    )


def text_hash(text: str) -> int:
    """64 bits that are the same in every run, unlike Python's own hash."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
