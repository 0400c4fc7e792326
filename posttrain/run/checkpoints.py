"""Checkpoints that are whole or absent.

transformers' Trainer writes a checkpoint file by file, and resumes from the newest folder
whatever its state: after a kill or a full disk in the middle of a save, automatic resume dies on
it, and missing optimizer, scheduler or RNG files and flipped bits pass unseen. Here a manifest
with the size and SHA-256 of every file is written last; what it does not match is no checkpoint.

    trainer.add_callback(CheckpointCallback(keep=2))      # with save_total_limit=None
    trainer.train(resume_from_checkpoint=newest_whole_checkpoint(folder))
"""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.errors import ConfigError
from posttrain.run.engine import from_all_ranks, wait_for_all
from posttrain.run.folder import HASH_THREADS, rewind_log, sha256_of, write_whole
from posttrain.run.options import is_main_process, say

if TYPE_CHECKING:
    from posttrain.run.settings import RunConfig

MANIFEST = "manifest.json"


def write_manifest(folder: str | Path, run: str | None = None) -> None:
    """Record size and SHA-256 of every file of `folder`, and the id of the run that wrote it.

    The manifest is the last file to appear.
    """
    folder = Path(folder)
    digests = _digests(folder)
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in digests.items()
    }
    write_whole(folder / MANIFEST, json.dumps({"run": run, "files": files}, indent=1))


def find_damage(folder: str | Path, run: str | None = None) -> str | None:
    """Return why a checkpoint cannot be trusted, in a few words, or None if it is whole.

    Args:
        run: the id of the run that it must come from; None: any.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected, writer = manifest["files"], manifest.get("run")
    except FileNotFoundError:
        return f"no {MANIFEST}: the save did not finish"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if run and writer and run != writer:
        return "it belongs to another run"
    try:
        return _damaged_file(folder, expected)
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read: {error.strerror}"


def _damaged_file(folder: Path, expected: dict[str, dict[str, object]]) -> str | None:
    for name, entry in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes, not {entry['size']}"
    for name, digest in _digests(folder, list(expected)).items():
        if digest != expected[name]["sha256"]:
            return f"{name} was changed after it was saved"
    return None


def newest_whole_checkpoint(folder: str | Path, run: str | None = None) -> Path | None:
    """Find the last `checkpoint-N` of a run that matches its manifest; say which were skipped.

    It reads all bytes of each checkpoint that it looks at, newest first: with more than one process
    call it on one and share the answer.
    """
    skipped, newest = [], None
    for checkpoint in reversed(list_checkpoints(folder)):
        damage = find_damage(checkpoint, run)
        if damage is None:
            newest = checkpoint
            break
        skipped.append(f"{checkpoint.name} ({damage})")
    if skipped:
        goes_on = f"resuming from {newest.name}" if newest else "no whole one is left"
        say(f"Skipped broken checkpoints: {', '.join(skipped)}; {goes_on}.")
    return newest


def list_checkpoints(folder: str | Path) -> list[Path]:
    """List the folders `checkpoint-N`, whole or not, by N."""
    numbered = [
        (int(match[1]), path)
        for path in Path(folder).glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered)]


@dataclass(eq=False)
class CheckpointCallback(TrainerCallback):
    """Writes the manifest once every rank has saved, then removes all older than the newest `keep`.

    The Trainer must not remove checkpoints itself (`save_total_limit=None`): it does so before
    the new one has its manifest, when the old one may be the only whole one.
    """

    keep: int | None = None
    run: str | None = None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Write the manifest of the checkpoint that was just saved, and remove old checkpoints."""
        # Each rank comes here after its own files (RNG state, ZeRO shards), at its own time.
        wait_for_all()
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            write_manifest(folder / f"checkpoint-{state.global_step}", self.run)
            best = state.best_model_checkpoint
            self._remove_old(folder, Path(best).name if best else None)
        wait_for_all()  # a rank that ended sooner would have the launcher end this one

    def _remove_old(self, folder: Path, best: str | None) -> None:
        if self.keep is None:
            return
        checkpoints = list_checkpoints(folder)
        whole = [path for path in checkpoints if (path / MANIFEST).is_file()]
        oldest_kept = checkpoints.index(whole[-self.keep :][0])
        for path in checkpoints[:oldest_kept]:
            if path.name != best:
                # First the manifest: a removal cut short leaves no folder that looks whole.
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)


def rewind_logs(folder: Path, step: int) -> None:
    """Drop the lines of a run's logs after this step; -1 drops all."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        rewind_log(folder / name, step)


def checkpoint_to_resume(folder: str | Path, config: RunConfig, run: str | None) -> str | None:
    """Find the newest whole checkpoint, and say where the run goes on; None: it starts anew.

    One rank reads the files, and all get its answer. ConfigError for fewer steps than it has.
    """
    found = None
    if is_main_process():
        found = newest_whole_checkpoint(folder, run)
    found = from_all_ranks(found)[0]
    if found is None:
        are_there = list_checkpoints(folder)
        why = "no checkpoint in it is whole" if are_there else "it has no checkpoint yet"
        say(f"resume  {config.output_dir} starts anew: {why}")
        if is_main_process():
            rewind_logs(Path(config.output_dir), -1)
        return None
    say(f"resume  {found}")
    done = int(found.name.rpartition("-")[2])
    if 0 < config.max_steps < done:
        raise ConfigError(
            f"--max_steps: expected at least {done}, the steps of {found}; found "
            f"{config.max_steps}. A run cannot take back steps."
        )
    return str(found)


def is_finished(checkpoint: str, config: RunConfig) -> bool:
    """Tell whether the last step is taken and the model saved: another step would change it."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    planned = config.max_steps
    if planned < 0 and config.num_train_epochs <= state["num_train_epochs"]:
        planned = state["max_steps"]
    has_model = (Path(config.output_dir) / "model").is_dir()
    return has_model and 0 < planned <= state["global_step"]


def _digests(folder: Path, names: list[str] | None = None) -> dict[str, str]:
    """Map the named files (default: all but the manifest) to their SHA-256."""
    if names is None:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        names = [name for name in names if not name.startswith(MANIFEST)]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(sha256_of, [folder / n for n in names]), strict=True))
