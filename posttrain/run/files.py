"""Files and folders that are whole or absent: written beside their place, moved there at the end.

    write_whole("run/config.yaml", text)
    with whole_file("reference.safetensors") as partial:
        save_file(tensors, partial)
    with whole_files("records.jsonl", "pairs.jsonl") as partials: …
    with atomic_folder("run/model") as partial: …

A kill or a full disk in the middle leaves the earlier file as it was. The rename within a folder is
atomic, and readers see the old or the new file. Importing this loads nothing heavy.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posttrain.run.console import is_main_process


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


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `path` if the block ends well, and else vanishes.

    An earlier folder at `path` stays until then. With several processes all enter, all get the
    same folder (sharded saves write from every rank), and the main process renames it.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all()
    try:
        yield partial
    except BaseException:
        # No waiting here: other ranks may be anywhere, and the launcher stops them.
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    wait_for_all()
    if is_main_process():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    wait_for_all()


def wait_for_all() -> None:
    """Wait until every rank of the run has come here; alone, a process goes on."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
