"""Rows of files too large for memory, and the key by which a row is compared with others.

    stream = RowStream(["data/a.jsonl", "data/b.parquet"])
    for row in stream:
        key_of(row)

Each iteration reads the rows anew: JSONL, CSV and parquet row by row or in blocks; a `.json` list
has to be read whole. A KeyPass reads a stream twice, first for the keys, then for the rows.

By default a row's key is its prompt side: instruction and input, question, prompt, or all turns
before the last answer; for plain text the text. Rows that ask the same are duplicates, whatever
they answer. Case, punctuation and spacing do not count. Digits and mathematical signs count
exactly, in their order: "Tom has 3 apples" and "Tom has 4 apples" are two problems, however much
they look alike.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.data.example import DroppedRow, Example
from posttrain.data.formats import FORMATS, Format, parse_row
from posttrain.data.read import READERS, Records, Row, read_records, suffix_of
from posttrain.errors import DataError

# Scripts that write no spaces between words: each character is taken for a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")
APOSTROPHE = re.compile("['’`´]")  # "don't" is one word, and the same as "dont"
DIGIT_OR_SIGN = re.compile(r"[\d+<=>^×÷√±≤≥≠]")


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


class Key(NamedTuple):
    """text: what is compared; guard: what must be the same to the letter in two duplicates."""

    text: str
    guard: str

    @property
    def hash(self) -> int:
        """64 bits that are the same for equal keys, in every run."""
        return text_hash(f"{self.guard}\0{self.text}")


class KeyPass:
    """A stream read twice: first its keys, remembering where each row stands, then its rows."""

    def __init__(self, stream: RowStream, columns: Sequence[str]) -> None:
        self.stream, self.columns = stream, columns
        self.files: list[str] = []
        self._file_of, self._numbers = array("q"), array("q")

    def __iter__(self) -> Iterator[Key]:
        for row in self.stream:
            if row.file not in self.files[-1:]:
                self.files.append(row.file)
            self._file_of.append(len(self.files) - 1)
            self._numbers.append(row.number)
            yield key_of(row, self.columns)

    def __len__(self) -> int:
        return len(self._numbers)

    def place(self, index: int) -> dict[str, Any]:
        """File and number of the row, as the files of removed rows name them."""
        return {"file": self.files[self._file_of[index]], "row": self._numbers[index]}

    def again(self) -> Iterator[tuple[int, Row]]:
        """The same rows a second time, numbered; DataError if they are not the same."""
        count = 0
        for count, row in enumerate(self.stream, start=1):
            if count > len(self) or self._numbers[count - 1] != row.number:
                raise self._changed()
            yield count - 1, row
        if count < len(self):
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(f"{self.stream.name}: changed while it was read. Start again.")


def key_of(row: Row, columns: Sequence[str] = ()) -> Key:
    """The row's key, out of `columns` or, without any, of its prompt side.

    A system turn goes into the guard: it may be long and the same in all rows, and then would make
    any two of them look alike; where it differs, the rows differ.
    """
    if columns:
        text = columns_text(row, columns)
        return Key(text, digits_and_signs(text))
    try:
        examples = parse_row(format_of(row), row)
    except DroppedRow:  # dialogues that share no prompt: no loader takes them, but they are rows
        text = columns_text(row, format_of(row).columns)
        return Key(text, digits_and_signs(text))
    text = "\n".join(dict.fromkeys(part for e in examples for part in _asked(e)))
    system = [turn["content"] for e in examples for turn in e.turns if turn["role"] == "system"]
    return Key(text, "\n".join([digits_and_signs(text), *system]))


def columns_text(row: Row, columns: Sequence[str]) -> str:
    """The texts of those `columns` that the row fills; DataError when it fills none."""
    return "\n".join(map(as_text, filled(row, columns)))


def filled(row: Row, columns: Sequence[str]) -> list[Any]:
    """The values of those `columns` that the row fills; DataError when it fills none."""
    values = [row.values[name] for name in columns if row.values.get(name) is not None]
    if not values:
        raise DataError(
            f"{row.where}: none of the columns {', '.join(columns)} is filled; found: "
            f"{', '.join(row.values) or 'nothing'}."
        )
    return values


def as_text(value: object) -> str:
    """Text as it is, all texts within lists and objects, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\n".join(map(as_text, value.values()))
    if isinstance(value, list):
        return "\n".join(map(as_text, value))
    return json.dumps(value, ensure_ascii=False, default=str)


def normalised(text: str) -> str:
    """The text without case, apostrophes and typographic variants of letters."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return APOSTROPHE.sub("", text).casefold()


def words_of(text: str) -> list[str]:
    """The text's words, normalised: `words_of("Don't PANIC -- 42!") == ["dont", "panic", "42"]`."""
    return WORD.findall(normalised(text))


def digits_and_signs(text: str) -> str:
    """Digits and signs, in order: `digits_and_signs("2 + 2 = 4, not 1,000.") == "2+2=41000"`."""
    return "".join(DIGIT_OR_SIGN.findall(text))


def text_hash(text: str) -> int:
    """64 bits that are the same in every run, unlike Python's own hash."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


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


def _asked(example: Example) -> list[str]:
    turns = [turn["content"] for turn in example.turns if turn["role"] != "system"]
    if example.input:
        turns.append(example.input)
    return turns or [answer["content"] for answer in example.answers]
