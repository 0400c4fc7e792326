"""Files that are whole or absent: written beside their place, and moved there at the end.

    write_whole("run/config.yaml", text)
    with whole_file("reference.safetensors") as partial:
        save_file(tensors, partial)
    with whole_files("records.jsonl", "pairs.jsonl") as partials: …

A kill or a full disk in the middle leaves the earlier file as it was. The rename within a folder is
atomic, and readers see the old or the new file. Importing this loads nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_files(*paths: str | Path) -> Iterator[list[Path]]:
    """Yield a partial path for each of these files, which takes its place if the block ends well.

    If the block raises, the partial files are removed and the earlier ones stay. Partial names hold
    the process id, so that two processes that write the same file do not mix.
    """
    targets = [Path(path) for path in paths]
    partials = [path.with_name(f".{path.name}.{os.getpid()}.partial") for path in targets]
    try:
        yield partials
        for partial in partials:
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # else a power cut could leave an empty file in place
        for partial, path in zip(partials, targets, strict=True):
            os.replace(partial, path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a partial path to write to, which takes the file's place if the block ends well."""
    with whole_files(path) as (partial,):
        yield partial


def write_whole(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
