"""Readers of one file: `(row number, record)` pairs out of JSONL, JSON, CSV and parquet.

The readers are our own because a broken line has to be reported with its file and line. In JSONL
the number of a row is its line, so that an editor can jump to it; elsewhere rows count from 1.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from posttrain.errors import DataError

NumberedRecords = Iterator[tuple[int, dict[str, Any]]]
# A cell may hold a whole document; the csv module stops at 128 kB unless told otherwise.
MAX_CELL_CHARS = 2**31 - 1


def read_jsonl(path: Path) -> NumberedRecords:
    """One JSON object per line; blank lines are skipped."""
    with _open_text(path) as lines:
        for number, line in enumerate(_decoded(lines, path), start=1):
            if line.strip():
                yield number, _object(_parse_json(line, path, number), path, number)


def read_json(path: Path) -> NumberedRecords:
    """A list of objects, or `{"data": [...]}`. JSON lines under the name .json are read as such."""
    with _open_text(path) as stream:
        text = "".join(_decoded(stream, path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if _first_line_is_an_object(text):
            yield from read_jsonl(path)
            return
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno})."
        ) from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(
            f"{path}: expected a list of records or an object with a list under 'data'; found "
            f"{kind_of(content)}. Put the records into a list, or one per line in a .jsonl file."
        )
    for number, record in enumerate(content, start=1):
        yield number, _object(record, path, number)


def read_csv(path: Path) -> NumberedRecords:
    """Comma-separated, the first row holds the column names. Every value is text."""
    csv.field_size_limit(MAX_CELL_CHARS)
    with _open_text(path) as stream:
        rows = csv.DictReader(_decoded(stream, path), strict=True)
        number = 0
        try:
            for number, record in enumerate(rows, start=1):
                if None in record:
                    raise DataError(
                        f"{path}, row {number} (line {rows.line_num}): more cells than the "
                        f"{len(rows.fieldnames)} columns. Quote cells that contain commas."
                    )
                yield number, record
        except csv.Error as error:
            raise DataError(
                f"{path}, row {number + 1} (line {rows.line_num}): not valid CSV ({error})."
            ) from None


def read_parquet(path: Path) -> NumberedRecords:
    """All columns of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        records = (record for batch in batches for record in batch.to_pylist())
        yield from enumerate(records, start=1)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}).") from None


READERS = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": read_json,
    ".json.gz": read_json,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".parquet": read_parquet,
}


def suffix_of(path: Path) -> str:
    """`.jsonl.gz` for `a.b.jsonl.gz`: the last suffix, with the one before it when gzipped."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def kind_of(value: Any) -> str:
    """What a JSON value is, in words, for error messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "nothing"
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else "a value")


def _open_text(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _decoded(stream: TextIO, path: Path) -> Iterator[str]:
    try:
        yield from stream
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason} near byte {error.start} of a block). "
            "Save the file as UTF-8."
        ) from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}).") from None


def _parse_json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}): "
            f"{line.strip()[:60]!r}. Each line must be one whole JSON object."
        ) from None


def _first_line_is_an_object(text: str) -> bool:
    first_line = text.lstrip().split("\n", 1)[0]
    try:
        return isinstance(json.loads(first_line), dict)
    except json.JSONDecodeError:
        return False


def _object(record: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(
            f"{path}, row {number}: expected an object with named columns; found {kind_of(record)}."
        )
    return record
