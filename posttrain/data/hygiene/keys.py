"""What of a row is compared with other rows: by default its prompt side.

The prompt side is instruction and input, question, prompt, or all turns before the last answer; of
plain text the text. Rows that ask the same are duplicates, whatever they answer.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from posttrain.data.examples import DroppedRow, Example
from posttrain.data.formats import parse_row
from posttrain.data.hygiene.rows import format_of, text_hash
from posttrain.data.hygiene.words import digits_and_signs
from posttrain.data.records import Row
from posttrain.errors import DataError


class Key(NamedTuple):
    """text: what is compared; guard: what must be the same to the letter in two duplicates."""

    text: str
    guard: str

    @property
    def hash(self) -> int:
        return text_hash(f"{self.guard}\0{self.text}")


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


def as_text(value: Any) -> str:
    """Text as it is; of lists and objects all texts in them; else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\n".join(map(as_text, value.values()))
    if isinstance(value, list):
        return "\n".join(map(as_text, value))
    return json.dumps(value, ensure_ascii=False, default=str)


def _asked(example: Example) -> list[str]:
    turns = [turn["content"] for turn in example.turns if turn["role"] != "system"]
    if example.input:
        turns.append(example.input)
    return turns or [answer["content"] for answer in example.answers]
