"""New files of JSON lines: whole or absent, and never in the place of another file.

with new_files("kept.jsonl", "kept.removed.jsonl") as (kept, removed):
    kept.write(row.values, row.where)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from posttrain.errors import DataError
from posttrain.run.folder import whole_files


class JsonLines:
    """An open file of JSON lines; `count` is the number of lines written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.count = 0

    def write(self, values: dict[str, Any], where: str) -> None:
        """Write one line. where: the row, for the error about a value that JSON cannot hold."""
        try:
            line = json.dumps(values, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where}: a value that JSON cannot hold ({error}). Turn the column into text, "
                "numbers or lists of them first."
            ) from None
        try:
            encoded = line.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair: only an escape can hold it
            encoded = json.dumps(values).encode("ascii")
        self._stream.write(encoded + b"\n")
        self.count += 1


@contextmanager
def new_files(*paths: str | Path) -> Iterator[list[JsonLines]]:
    """Open every path for writing; they appear under their names together, when all is written.

    After an error none of them is there. Raises DataError for a path that exists, does not end
    in .jsonl, or is named twice.
    """
    targets = check_new(paths)
    with whole_files(*targets) as partials:
        with ExitStack() as stack:
            yield [JsonLines(stack.enter_context(partial.open("xb"))) for partial in partials]
        check_new(targets)  # another program may have been quicker


def check_new(names: Sequence[str | Path]) -> list[Path]:
    """The paths, if all of them can be written; else raise DataError, best before long work."""
    paths = [Path(name).expanduser() for name in names]
    for path in paths:
        if path.exists():
            raise DataError(
                f"{path}: exists already, and is not overwritten. Name another output or move it."
            )
        if path.suffix != ".jsonl":
            raise DataError(f"{path}: expected a name that ends in .jsonl; rows are written so.")
        if not path.parent.is_dir():
            raise DataError(f"{path}: the folder {path.parent} does not exist. Make it first.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise DataError(f"{', '.join(map(str, paths))}: two outputs of one name; name two files.")
    return paths


def beside(output: str | Path, what: str) -> Path:
    """A file name next to the output: `beside("kept.jsonl", "removed")` is kept.removed.jsonl."""
    return Path(output).with_suffix(f".{what}.jsonl")
