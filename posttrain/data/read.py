"""Raw rows and where they came from.

    for row in read_records("data/pairs.jsonl"):
        row.where, row.values

A source is a JSON, JSONL, CSV or parquet file (JSON and CSV also gzipped), a folder of them, a name
on the Hugging Face Hub (`owner/name` or `owner/name:config`), a list of dicts, or a
`datasets.Dataset`. No tokenizer and no torch are needed.

The readers are our own: a broken line has to be reported with its file and line. In JSONL the
number of a row is its line, where an editor can jump to; elsewhere rows count from 1.
"""

from __future__ import annotations

import csv
import difflib
import functools
import gzip
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from posttrain.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Source = str | Path | Sequence[dict[str, Any]]
NumberedRecords = Iterator[tuple[int, dict[str, Any]]]
HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?")
SPLIT_WORDS = {"train": {"train", "training"}, "test": {"test", "testing"}} | {
    "validation": {"validation", "valid", "val", "dev", "eval"}
}
MAX_CELL_CHARS = 2**31 - 1  # a cell may hold a document; csv stops at 128 kB unless told
BATCH_ROWS = 1024  # of a parquet file, which are Python objects at the same time


@dataclass(frozen=True)
class Row:
    """One record; `number` is its line in JSONL, else its position in the file, from 1."""

    values: dict[str, Any]
    file: str
    number: int

    @property
    def where(self) -> str:
        """File and row, for error messages."""
        return f"{self.file}, row {self.number}"

    def text(self, column: str) -> str:
        """The column's text; empty where the column is. Raises DataError for another type."""
        value = self.values.get(column)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.wrong_type(column, value, "text")
        return value

    def text_or_number(self, column: str) -> str:
        """The column's text, or its number as text."""
        value = self.values.get(column)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        return self.text(column)

    def number_or_nothing(self, column: str) -> float | None:
        """The column's number; None where it is empty. Raises DataError for another type."""
        value = self.values.get(column)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong_type(column, value, "a number")
        return float(value)

    def wrong_type(self, column: str, value: object, expected: str) -> DataError:
        """The error, to be raised, for a column that holds another type than `expected`."""
        found = f"{kind_of(value)} ({str(value)[:40]})"
        return DataError(f"{self.where}: '{column}' is {found}; expected {expected}.")


@dataclass(frozen=True)
class FileRows:
    """The rows of one file. Each pass reads them anew, since they may not fit into memory.

    read: begins a pass, over numbers and rows.
    paths: the files whose bytes settle what is read; none for rows in memory.
    known: number of rows and columns, where they need no pass.
    """

    file: str
    read: Callable[[], NumberedRecords]
    paths: tuple[Path, ...] = ()
    known: tuple[int, list[str]] | None = None

    def __iter__(self) -> Iterator[Row]:
        count = 0
        for number, values in self.read():
            count += 1
            yield Row(values, self.file, number)
        if count != self.found[0]:
            raise DataError(f"{self.file}: changed while it was read. Start again.")

    @functools.cached_property
    def found(self) -> tuple[int, list[str]]:
        """The number of rows, and the columns that any has, in order of first appearance."""
        if self.known:
            return self.known
        count, seen = 0, {}
        for _, values in self.read():
            count += 1
            seen.update(dict.fromkeys(values))
        return count, list(seen)


@dataclass(frozen=True)
class Records:
    """Rows of one or more files, in order. Each iteration reads them anew."""

    source: str
    files: tuple[FileRows, ...]

    def __len__(self) -> int:
        return sum(part.found[0] for part in self.files)

    def __iter__(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(self.files)

    @property
    def columns(self) -> list[str]:
        """All columns that any row has, in order of first appearance."""
        return list(dict.fromkeys(name for part in self.files for name in part.found[1]))

    def counted(self) -> Records:
        """Itself, after every row was read once; DataError if none is there, or one is broken."""
        if not len(self):
            raise DataError(f"{self.source}: no rows. The file is empty.")
        return self


def read_records(source: Source, *, split: str | None = "train") -> Records:
    """Read every row of `source` once, and return what reads them again.

    split: which files of a folder, by words in their names, or which split on the Hub; None: all.

    Raises DataError, naming file and line, for a source that is missing, empty or broken.
    """
    return open_records(source, split=split).counted()


def open_records(source: Source, *, split: str | None = "train") -> Records:
    """Find what read_records would read, and read no row of a file yet."""
    if not isinstance(source, (str, Path)):
        return _rows_in_memory(source)
    if (path := Path(source).expanduser()).exists():
        files = _files_of_folder(path, split) if path.is_dir() else [path]
        return Records(_source_name(path, files), tuple(_open_file(file) for file in files))
    return _open_hub(_hub_name(str(source), path), split)


def _rows_in_memory(rows: Sequence[dict[str, Any]]) -> Records:
    name = "rows in memory"
    if hasattr(rows, "column_names"):
        return Records(name, (_rows_of_dataset(name, rows),))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{name}, row {number}: expected a dict; found {kind_of(row)}.")
    return Records(name, (FileRows(name, lambda: enumerate(rows, start=1)),))


def _rows_of_dataset(name: str, rows: Dataset, paths: tuple[Path, ...] = ()) -> FileRows:
    if "images" in rows.column_names:
        from posttrain.data.images import undecoded

        rows = undecoded(rows)
    known = (len(rows), rows.column_names)
    return FileRows(name, lambda: enumerate(rows, start=1), paths, known)


def _open_file(path: Path) -> FileRows:
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise DataError(
            f"{path}: cannot tell the file type from its name. Known: {', '.join(READERS)}."
        )
    return FileRows(str(path), lambda: reader(path), (path,))


def _source_name(path: Path, files: list[Path]) -> str:
    if files == [path]:
        return str(path)
    return str(files[0]) if len(files) == 1 else f"{path} ({len(files)} files)"


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    """The data files whose names say the split; for train also files that name no split."""
    files = sorted(file for file in folder.rglob("*") if suffix_of(file) in READERS)
    files = [f for f in files if not any(p.startswith(".") for p in f.relative_to(folder).parts)]
    if not files:
        raise DataError(f"{folder}: no data files. Known file types: {', '.join(READERS)}.")
    if split is None:
        return files
    named = {file: _splits_named(file.relative_to(folder)) for file in files}
    chosen = [file for file in files if split in named[file]]
    if not chosen and split == "train":
        chosen = [file for file in files if not named[file]]
        if len(files) == 1:  # the only file there is what the user meant
            chosen = files
    if not chosen:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:8])
        raise DataError(
            f"{folder}: no file for the split '{split}'; found: {names}. Name the file itself, or "
            f"rename it so that its name holds '{split}'."
        )
    return chosen


def _splits_named(path: Path) -> set[str]:
    words = set(re.split(r"[^a-z0-9]+", str(path).lower()))
    return {split for split, names in SPLIT_WORDS.items() if words & names}


def _hub_name(source: str, path: Path) -> re.Match[str]:
    """The parts of a Hub name; an error when `source` reads as a local path that is missing."""
    match = HUB_NAME.fullmatch(source)
    folder = path.parent
    is_local = suffix_of(path) in READERS or (folder.is_dir() and folder != Path())
    if match and not is_local:
        return match
    neighbours = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if near := difflib.get_close_matches(path.name, neighbours, n=1, cutoff=0.5):
        hint = f"Did you mean {folder / near[0]}?"
    elif not folder.is_dir():
        hint = f"The folder {folder} does not exist either."
    else:
        hint = "Give a file, a folder, or a dataset on the Hub as owner/name."
    raise DataError(f"{source}: no such file or folder. {hint}")


def _open_hub(match: re.Match[str], split: str | None) -> Records:
    import datasets

    name, config = match["name"], match["config"]
    try:
        rows = datasets.load_dataset(name, config, split=split or "train")
    except (OSError, ValueError) as error:  # offline, unknown name, unknown config or split
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{name}: no such file or folder here, and the Hub dataset of that name cannot be "
            f"loaded ({reason}). Check the name (owner/name or owner/name:config), the split "
            f"'{split}' and the connection, or give a local path."
        ) from None
    paths = tuple(Path(file["filename"]) for file in rows.cache_files)
    # Slices of a split lie in the same files: the name tells them apart (cache.py).
    file = match.string + (f", split {split}" if split not in (None, "train") else "")
    return Records(match.string, (_rows_of_dataset(file, rows, paths),))


def read_jsonl(path: Path) -> NumberedRecords:
    """One JSON object per line; blank lines are skipped."""
    with _open_text(path) as lines:
        for number, line in enumerate(_decoded(lines, path), start=1):
            if line.strip():
                yield number, _object(_parse_json(line, path, number), path, number)


def read_json(path: Path) -> NumberedRecords:
    """A list of objects, or `{"data": [...]}`; JSON lines under the name .json are read as such."""
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
    """Rows of comma-separated cells, after a row of column names. Every value is text."""
    csv.field_size_limit(MAX_CELL_CHARS)
    with _open_text(path) as stream:
        rows = csv.DictReader(_decoded(stream, path), strict=True)
        yield from enumerate(_csv_records(rows, path), start=1)


def _csv_records(rows: csv.DictReader, path: Path) -> Iterator[dict[str, str]]:
    number = 0
    try:
        for number, record in enumerate(rows, start=1):
            if None in record:
                raise DataError(
                    f"{path}, row {number} (line {rows.line_num}): more cells than the "
                    f"{len(rows.fieldnames)} columns. Quote cells that contain commas."
                )
            yield record
    except csv.Error as error:
        raise DataError(
            f"{path}, row {number + 1} (line {rows.line_num}): not valid CSV ({error})."
        ) from None


def read_parquet(path: Path) -> NumberedRecords:
    """Rows of a parquet file, with all their columns."""
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(BATCH_ROWS)
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
    """The last suffix, with the one before it when gzipped: `.jsonl.gz` for `a.b.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def kind_of(value: object) -> str:
    """Name the type of a JSON value, for error messages: `kind_of([1]) == "a list"`."""
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


def _parse_json(line: str, path: Path, number: int) -> object:
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


def _object(record: object, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(
            f"{path}, row {number}: expected an object with named columns; found {kind_of(record)}."
        )
    return record
