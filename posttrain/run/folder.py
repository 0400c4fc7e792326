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
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError
from posttrain.run.options import DataclassInstance, is_main_process, load, say

if TYPE_CHECKING:
    pass

# Both files make a folder a run; neither holds results of training.
RUN_FILES = frozenset({"config.yaml", "env.json"})
# Settings that a resumed run may change: duration, intervals, memory. A checkpoint brings its own
# optimizer and schedule, so any other change would be silently ignored.
MAY_CHANGE = frozenset(
    {
        "output_dir",
        "resume",
        "max_steps",
        "num_train_epochs",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "report_to",
        "max_tokens_per_microbatch",
        "gradient_checkpointing",
        "attn_implementation",
        # a teacher's costs and address
        "num_records",
        "max_requests",
        "max_tokens",
        "max_cost",
        "prompt_price",
        "completion_price",
        "timeout_seconds",
        "max_attempts",
        "teacher_url",
        "teacher_key_variable",
    }
)
PACKAGES = ("posttrain", "torch", "transformers", "accelerate", "peft", "datasets", "trl")
OPTIONAL_PACKAGES = ("deepspeed", "bitsandbytes", "vllm", "flash_attn")


def open_run(
    output_dir: str | Path,
    config: DataclassInstance,
    *,
    resume: bool = False,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Prepare the folder and write config.yaml and env.json; only the main process acts.

    Args:
        config: the recipe's dataclass of settings.
        resume: continue the run in the folder; if there is none, start one.
        facts: what env.json holds besides command, versions and machine, such as the sandbox.

    Raises:
        ConfigError: the folder is not a run, holds one of the run's own inputs, or its run cannot
            be resumed with these settings.
    """
    folder = Path(output_dir)
    if not is_main_process():
        return folder
    continues = resume and _is_run(folder)
    if continues:
        _refuse_changed_settings(folder, config)
    else:
        _make_room(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**describe_environment(), **(facts or {})}
    if continues:
        started = json.loads((folder / "env.json").read_text(encoding="utf-8"))
        _refuse_other_world_size(started["world_size"], environment["world_size"])
        environment = {**started, "resumed": [*started.get("resumed", []), environment]}
    _write_json(folder / "env.json", environment)
    save_config(config, folder / "config.yaml")
    return folder


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


def describe_environment() -> dict[str, Any]:
    """Collect what another person needs to run this again: command, versions, machine."""
    import torch

    on_gpu = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {name: _version(name) for name in PACKAGES + OPTIONAL_PACKAGES}
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git": _git_commit(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name, version in versions.items() if version},
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "gpus": gpus if on_gpu else [],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in RUN_FILES)


def _make_room(folder: Path, config: DataclassInstance) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"--output_dir: expected a folder, found the file '{folder}'.")
    found = {path.name for path in folder.iterdir()}
    if found <= RUN_FILES:
        return
    if not _is_run(folder):
        raise ConfigError(
            f"--output_dir: expected a new folder or an earlier run, found '{folder}' with other "
            f"files ({', '.join(sorted(found)[:3])}). Name another folder."
        )
    _refuse_inputs_inside(folder, config)
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    say(f"{folder} held an earlier run: moved to {aside}.")


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


def _refuse_other_world_size(before: int, now: int) -> None:
    """Refuse another number of ranks: it decides the optimizer batch and each rank's data."""
    if before != now:
        raise ConfigError(
            f"--resume: expected {before} processes as the run was started with, found {now}. "
            f"Launch with --num_processes {before}."
        )


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit(root: Path) -> str | None:
    """The commit of this checkout, `-dirty` when files differ; None when it is not a checkout."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


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


def save_config(config: DataclassInstance, path: str | Path) -> None:
    """Write all settings as YAML; `--config path` reads an equal object back."""
    import yaml

    values = dataclasses.asdict(config)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    write_whole(path, text)
