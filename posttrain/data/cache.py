"""Prepared examples on disk: what was made once is read back at the next start, memory-mapped.

    dataset, line, first = prepared(loader, make)

They are kept in the folder `posttrain` of the cache of `datasets`, under a fingerprint of all that
settles them: the bytes of the files, the tokenizer, the template, the settings, and the code of
this package. Where one of these changes, the name does, so nothing kept is ever out of date. What
is found damaged is made again. `datasets.disable_caching()` switches it off, and the folder may be
deleted at any time.

An entry appears whole, by the renaming of its folder. A lock lets the first of several processes
make it while the others wait; the lock of a process that was killed is free.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from posttrain.data.loading import Loader, Made, Run
from posttrain.data.read import Records
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Kept = tuple["Dataset", str, list[Run]]  # the examples, and their report
READ_BYTES = 1 << 20
EXAMPLES, ABOUT = "examples.arrow", "about.json"
PACKAGES = ("transformers", "tokenizers", "jinja2", "trl")  # that have a part in the token ids
NOW = re.compile(r"strftime_now\((?:\s*(['\"])(?P<form>.*?)\1\s*\))?")


def prepared(loader: Loader, make: Callable[[Loader], Made]) -> Kept:
    """The examples that `make` gives, from an earlier start if it made the same.

    Raises what `make` raises; DataError for files that change meanwhile, ConfigError for a disk
    that has no room.
    """
    import datasets

    tokenizer = _about_tokenizer(loader.tokenizer)
    if tokenizer is None or not datasets.is_caching_enabled():
        return make(loader).in_memory()
    files = _about_files(loader.records)
    settings = [make.__name__, loader.need, loader.template, loader.limit, loader.option]
    settings.append(loader.processor is not None)
    name = _fingerprint([files, settings, tokenizer])
    entry = Path(datasets.config.HF_DATASETS_CACHE) / "posttrain" / name
    if kept := _read(entry):
        return kept
    if loader.images:  # they lie in files of their own, which may change
        return make(loader).in_memory()
    try:
        lock = _locked(entry)
    except OSError:  # a folder that is read-only, or has no locks
        return make(loader).in_memory()
    with lock:
        return _read(entry) or _write(entry, loader, make, files)


def _fingerprint(parts: list[Any]) -> str:
    """A name for all that settles the examples: these parts, and the code that makes them."""
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    code = [_digest(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
    text = json.dumps([*parts, versions, code])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _about_files(records: Records) -> list[Any]:
    return [records.source, [[part.file, *map(_digest, part.paths)] for part in records.files]]


def _about_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    """All of a tokenizer that ids and texts hang on; None for one with code of its own.

    Templates may print the date, so what they would print now is a part of it.
    """
    if not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return None
    template = getattr(tokenizer, "chat_template", None) or ""
    texts = template.values() if isinstance(template, dict) else [template]
    dates = [match["form"] for text in texts for match in NOW.finditer(text)]
    if None in dates:
        return None
    now = datetime.datetime.now()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [
        type(tokenizer).__qualname__,
        tokenizer.backend_tokenizer.to_str(),
        template,
        [now.strftime(form) for form in dates],
        special,
        tokenizer.all_special_tokens,
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        [tokenizer.split_special_tokens, tokenizer.clean_up_tokenization_spaces],
    ]


def _read(entry: Path) -> Kept | None:
    """The examples kept in a folder; None if it is not there or not as it was written."""
    import datasets
    import pyarrow

    try:
        about = json.loads((entry / ABOUT).read_text(encoding="utf-8"))
        line, first = about["report"]
        if about["seal"] != _seal(entry / EXAMPLES, about["report"]):
            return None
        table = datasets.table.MemoryMappedTable.from_file(str(entry / EXAMPLES))
        return datasets.Dataset(table, fingerprint=entry.name), line, [*map(tuple, first)]
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
        return None


def _write(entry: Path, loader: Loader, make: Callable[[Loader], Made], files: list[Any]) -> Kept:
    """Make the examples in a folder beside, which then takes the name."""
    partial = entry.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        loader.path = partial / EXAMPLES
        made = make(loader)
        made.columns.close()
        if _about_files(loader.records) != files:
            raise DataError(f"{loader.records.source}: changed while it was read. Start again.")
        report = [made.line, made.first]
        about = {"report": report, "seal": _seal(loader.path, report)}
        (partial / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)
        partial.rename(entry)
    except OSError as error:
        if error.filename and not error.filename.startswith(str(partial)):
            raise  # of a file that is read
        raise ConfigError(
            f"{partial}: the prepared data cannot be written ({error}). Make room, or set "
            "HF_DATASETS_CACHE to another folder."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _read(entry)


def _locked(entry: Path) -> IO[str]:
    """Wait for the lock of an entry, and hold it until the file is closed or the process ends."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    file = entry.with_suffix(".lock").open("a", encoding="utf-8")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _seal(examples: Path, report: list[Any]) -> str:
    """A digest of the examples and their report, by which a damaged byte is found."""
    return hashlib.sha256(f"{_digest(examples)} {json.dumps(report)}".encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
