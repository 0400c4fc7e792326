"""Two passes over a stream of rows: the first for the keys, the second for the rows."""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from posttrain.data.hygiene.keys import Key, key_of
from posttrain.data.hygiene.rows import RowStream
from posttrain.data.records import Row
from posttrain.errors import DataError


class KeyPass:
    """The keys of all rows in one pass, remembering where each row stands."""

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
