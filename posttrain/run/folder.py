"""The run folder: its settings, its environment, and one line of numbers per log step.

    folder = open_run(config.output_dir, config, resume=config.resume)
    append_log(folder / "metrics.jsonl", {"step": 20, "loss": 1.234})

A run folder holds config.yaml (`--config` repeats the run), env.json, metrics.jsonl,
samples.jsonl, model/ and checkpoints/. Nothing in it is ever overwritten by another run: an
earlier run is moved aside to the first free of `folder.1`, `folder.2`, …; a folder that is not a
run is refused. A run that stopped before its first log line left nothing, so its place is taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from posttrain.errors import ConfigError
from posttrain.run.options import DataclassInstance, is_main_process, load, say

if TYPE_CHECKING:
    from posttrain.run.settings import RunConfig


# Both files make a folder a run; neither holds results of training.
RUN_FILES = frozenset({"config.yaml", "env.json"})
LOCK = ".lock"  # held by the process that writes the folder
READ_BYTES = 1 << 20
HASH_THREADS = 4  # hashing frees the interpreter's lock; more threads than this wait for the disk
# Settings that a resumed run may change: duration, intervals, memory, and a teacher's costs and
# address. A checkpoint brings its own optimizer and schedule, so any other change would be ignored.
MAY_CHANGE = {
    *("output_dir", "resume", "allow_changed", "exit_zero_on_stop", "timeout_seconds", "dry_run"),
    *("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "report_steps"),
    *("save_total_limit", "report_to", "max_tokens_per_microbatch", "gradient_checkpointing"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
    *("attn_implementation", "reward_workers", "reward_timeout", "max_unscored_share"),
    *("vllm_gpu_memory_utilization", "num_records", "max_requests", "max_tokens", "max_cost"),
    *("prompt_price", "completion_price", "max_attempts", "teacher_url", "teacher_key_variable"),
}
# Settings that may name a file or folder that a result hangs on.
INPUTS = (
    *("model_name_or_path", "reward_model", "short_model", "dataset", "eval_dataset", "reward"),
    *("seed_tasks", "teacher", "teacher_model", "teacher_replay"),
)


def check_run(config: RunConfig) -> None:
    """Refuse an output_dir that cannot take this run; nothing is written or moved.

    Recipes call it first, before anything that takes time. Only the main process looks.

    Raises:
        ConfigError: another process runs there, or it is no run, cannot be written to, holds one
            of the run's own inputs, or its run cannot be resumed with these settings.
    """
    folder = Path(config.output_dir)
    if not is_main_process():
        return
    _refuse_unwritable(folder)
    if not folder.is_dir():
        return
    _refuse_live(folder)
    if config.resume and _is_run(folder):
        _refuse_other_world_size(_read_environment(folder)["world_size"])
        _refuse_changed_settings(folder, config)
    elif not _is_free(folder):
        _refuse_inputs_inside(folder, config)


def open_run(
    output_dir: str | Path,
    config: DataclassInstance,
    *,
    resume: bool = False,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Take the folder for this run, and write config.yaml and env.json; only the main process acts.

    The folder is this process's until `close_run`, or until the process ends, however it ends.

    Args:
        config: the recipe's dataclass of settings.
        resume: continue the run in the folder; if there is none, start one.
        facts: what env.json holds besides command, versions, machine and inputs, such as the
            sandbox.

    Raises:
        ConfigError: see check_run; or an input is not what it was when the run was started.
    """
    from posttrain.run.engine import describe_environment  # loads torch

    folder = Path(output_dir)
    if not is_main_process():
        return folder
    close_run(folder)
    check_run(dataclasses.replace(config, output_dir=str(folder), resume=resume))
    inputs = fingerprints(config)
    continues = resume and _is_run(folder)
    environment = {**describe_environment(), "inputs": inputs, **(facts or {})}
    if continues:
        started = _read_environment(folder)
        _refuse_changed_inputs(started.get("inputs", {}), inputs, config)
        environment = {**started, "resumed": [*started.get("resumed", []), environment]}
    else:
        environment = {"run": uuid.uuid4().hex, **environment}
        _refuse_live(folder)  # once more: reading the inputs took its time
        _make_room(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _LOCKS[folder.resolve()] = _take_lock(folder)
    write_whole(folder / "env.json", json.dumps(environment, indent=2, ensure_ascii=False) + "\n")
    save_config(config, folder / "config.yaml")
    return folder


def close_run(folder: str | Path) -> None:
    """Let other processes have the folder."""
    if lock := _LOCKS.pop(Path(folder).resolve(), None):
        lock.close()


def run_id(folder: str | Path) -> str | None:
    """Return the id that the run in this folder got at its start; None if there is none."""
    return _read_environment(Path(folder)).get("run") if _is_run(Path(folder)) else None


_LOCKS: dict[Path, IO[str]] = {}  # folders that this process writes; the open file is the lock


def _take_lock(folder: Path) -> IO[str]:
    """Lock the folder until the file is closed, or the process ends; ConfigError if it is held."""
    import fcntl

    file = open(folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115  (open as long as the run)
    for seconds in (0.05, 0.05, 0.05, 0.0):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # another writer, or only one that looks
            time.sleep(seconds)
        except OSError:  # some network file systems have no locks
            return file
    else:
        raise _live(folder)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _refuse_live(folder: Path) -> None:
    """Refuse a folder that another process writes."""
    import fcntl

    path = folder / LOCK
    if folder.resolve() in _LOCKS or not path.is_file():
        return
    with path.open(encoding="utf-8") as file, suppress(OSError):
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _live(folder) from None


def _live(folder: Path) -> ConfigError:
    who = (folder / LOCK).read_text(encoding="utf-8") or "just started"
    what = f"--output_dir: '{folder}' is written by a run that is going on, {who}."
    return ConfigError(f"{what} Name another folder, or stop that run first.")


def fingerprints(config: object) -> dict[str, dict[str, str]]:
    """Return {setting: {path, sha256}} for each of INPUTS that names a file or folder of this disk.

    That is data, models, tokenizers and `FILE.py:FUNCTION`: what a result hangs on besides the
    settings. A folder's fingerprint is that of its files' names and contents.
    """
    found = {}
    for name in INPUTS:
        value = getattr(config, name, None)
        if not isinstance(value, str) or not value:
            continue
        path = Path(value if Path(value).exists() else value.rpartition(":")[0])
        if str(path) != "." and path.exists():
            found[name] = {"path": str(path), "sha256": _fingerprint(path)}
    return found


def _fingerprint(path: Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    names = [file.relative_to(path).as_posix() for file in files]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = list(pool.map(sha256_of, files))
    if path.is_file():
        return digests[0]
    return hashlib.sha256(json.dumps([names, digests]).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _refuse_changed_inputs(
    before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]], config: object
) -> None:
    changed = [name for name in before if before[name]["sha256"] != now.get(name, {}).get("sha256")]
    if not changed:
        return
    named = ", ".join(f"--{name} '{before[name]['path']}'" for name in changed)
    what = f"the content of {named} is not what it was when the run was started"
    allowed = getattr(config, "allow_changed", None)  # None: a recipe without this setting
    if not allowed:
        goes_on = "." if allowed is None else " or continue on purpose with --allow_changed."
        raise ConfigError(
            f"--resume: {what}. Put it back, start a run with another --output_dir{goes_on}"
        )
    say(f"resume  {what}: continuing, as --allow_changed says")


def append_log(path: str | Path, record: Mapping[str, object]) -> None:
    """Append one JSON line to the file; NaN and infinities become null."""
    line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Read the records that `append_log` wrote, without a last line cut by a kill."""
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                records.append(json.loads(line))
    return records


def rewind_log(path: str | Path, step: int) -> None:
    """Drop the records after `step`, because a run resumed from there writes them again."""
    path = Path(path)
    if not path.exists():
        return
    kept = [record for record in read_log(path) if record.get("step", 0) <= step]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept]
    write_whole(path, "".join(lines))


def _read_environment(folder: Path) -> dict[str, Any]:
    """Read env.json; ConfigError if it is damaged."""
    path = folder / "env.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        what = f"--resume: {path} is damaged, so it is not known how the run was started."
        raise ConfigError(f"{what} Start another one with another --output_dir.") from None


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in RUN_FILES)


def _is_free(folder: Path) -> bool:
    """True where a run stopped before its first result, or none has been yet."""
    return {path.name for path in folder.iterdir()} <= RUN_FILES | {LOCK}


def _make_room(folder: Path) -> None:
    """Move an earlier run aside."""
    if not folder.exists() or _is_free(folder):
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    say(f"{folder} held an earlier run: moved to {aside}.")


def _refuse_unwritable(folder: Path) -> None:
    """Refuse what cannot become, or is not, a folder of runs that this user may write to."""
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output_dir: expected a folder, found the file '{folder}'.")
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if nearest.is_dir():
            tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ConfigError(f"--output_dir: '{folder}' cannot be made: {error.strerror}.") from None
    if not nearest.is_dir():
        raise ConfigError(f"--output_dir: expected a folder in '{nearest}', which is a file.")
    if folder.is_dir() and not _is_run(folder) and not _is_free(folder):
        found = sorted(path.name for path in folder.iterdir())
        raise ConfigError(
            f"--output_dir: expected a new folder or an earlier run, found '{folder}' with other "
            f"files ({', '.join(found[:3])}). Name another folder."
        )


def _refuse_inputs_inside(folder: Path, config: DataclassInstance) -> None:
    inside = folder.resolve()
    if Path.cwd().is_relative_to(inside):
        raise ConfigError(f"--output_dir: '{folder}' holds the working directory; name another.")
    for name, value in vars(config).items():
        if name == "output_dir" or not isinstance(value, str) or not value:
            continue
        path = Path(value).resolve()
        if path.is_relative_to(inside) and path.exists():
            raise ConfigError(
                f"--{name}: '{value}' lies in --output_dir '{folder}', whose earlier run would be "
                "moved aside. Name another --output_dir."
            )


def _refuse_changed_settings(folder: Path, config: DataclassInstance) -> None:
    path = folder / "config.yaml"
    before = load(type(config), ["--config", str(path)])
    for field in dataclasses.fields(config):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if old != new and field.name not in MAY_CHANGE:
            raise ConfigError(
                f"--{field.name}: expected {old!r} as in {path}, found {new!r}. A resumed run "
                "keeps it; start another one with another --output_dir."
            )


def _refuse_other_world_size(before: int) -> None:
    """Refuse another number of ranks: it decides the optimizer batch and each rank's data."""
    now = int(os.environ.get("WORLD_SIZE", "1"))
    if before != now:
        what = f"expected {before} processes as the run was started with, found {now}"
        raise ConfigError(f"--resume: {what}. Launch with --num_processes {before}.")


def _plain(value: object) -> Any:
    """The value with Python's own types, and null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a tensor's or numpy's scalar
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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


def save_config(config: DataclassInstance, path: str | Path) -> None:
    """Write all settings as YAML; `--config path` reads an equal object back."""
    import yaml

    values = dataclasses.asdict(config)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    write_whole(path, text)
