"""A checkpoint is whole or absent: damage of each kind is found, and training goes on before it."""

import datetime
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from posttrain.run.checkpoints import (
    CheckpointCallback,
    find_damage,
    list_checkpoints,
    newest_whole_checkpoint,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Whole checkpoints 9 and 10 (which sorts before 9 as text), as a Trainer may leave them."""
    for step in (9, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        (checkpoint / "shards").mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(bytes(range(256)) * 20)
        (checkpoint / "shards" / "rank_0.pt").write_bytes(b"optimizer")
        write_manifest(checkpoint)
    return tmp_path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_by_number_is_chosen_in_silence(folder, capsys):
    (folder / "checkpoint-best").mkdir()
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-10"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda c: flip_a_bit(c / "model.safetensors"),
            "model.safetensors was changed after it was saved",
        ),
        (lambda c: flip_a_bit(c / "shards/rank_0.pt"), "shards/rank_0.pt was changed"),
        (lambda c: (c / "shards/rank_0.pt").unlink(), "shards/rank_0.pt is missing"),
        (
            lambda c: (c / "shards/rank_0.pt").write_bytes(b"opt"),
            "shards/rank_0.pt has 3 bytes, not 9",
        ),
        (lambda c: (c / "manifest.json").unlink(), "no manifest.json: the save did not finish"),
        (lambda c: (c / "manifest.json").write_text(""), "manifest.json cannot be read"),
        (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_said_in_one_line(folder, capsys, damage, reason):
    damage(folder / "checkpoint-10")
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-9"
    said = capsys.readouterr().out
    assert said.startswith(f"Skipped broken checkpoints: checkpoint-10 ({reason}")
    assert said.endswith("; resuming from checkpoint-9.\n")
    assert said.count("\n") == 1


def test_no_whole_checkpoint_is_none(folder, tmp_path, capsys):
    assert newest_whole_checkpoint(tmp_path / "absent") is None
    for checkpoint in list_checkpoints(folder):
        (checkpoint / "manifest.json").unlink()
    assert newest_whole_checkpoint(folder) is None
    assert capsys.readouterr().out.endswith("no whole one is left.\n")


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.dropout(self.layer(x)).square().mean()}


def train(folder: Path, *, keep: int | None = None, resume: Path | None = None) -> Trainer:
    rows = [{"x": torch.randn(3, generator=torch.Generator().manual_seed(i))} for i in range(12)]
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=4,
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    callbacks = [CheckpointCallback(keep=keep)]
    trainer = Trainer(TinyModel(), args, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def test_training_resumed_before_the_damage_ends_at_the_same_weights(tmp_path, capsys):
    whole = train(tmp_path)
    assert [find_damage(c) for c in list_checkpoints(tmp_path)] == [None] * 4
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        assert f'"{name}"' in (tmp_path / "checkpoint-4" / "manifest.json").read_text()

    flip_a_bit(tmp_path / "checkpoint-4" / "optimizer.pt")
    (tmp_path / "checkpoint-3" / "rng_state.pth").unlink()
    capsys.readouterr()
    newest = newest_whole_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-2"
    resumed = train(tmp_path, resume=newest)
    assert torch.equal(resumed.model.layer.weight, whole.model.layer.weight)
    assert [find_damage(c) for c in list_checkpoints(tmp_path)] == [None] * 4


def test_only_the_newest_whole_checkpoints_are_kept(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()  # left by a save that was killed
    (tmp_path / "checkpoint-1" / "stale.bin").write_bytes(b"x")
    train(tmp_path, keep=2)
    assert [c.name for c in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_the_best_checkpoint_is_never_removed(folder):
    state = TrainerState(global_step=10, best_model_checkpoint=str(folder / "checkpoint-9"))
    args = SimpleNamespace(output_dir=str(folder))
    CheckpointCallback(keep=1).on_save(args, state, None)
    assert [c.name for c in list_checkpoints(folder)] == ["checkpoint-9", "checkpoint-10"]
    state.best_model_checkpoint = None
    CheckpointCallback(keep=1).on_save(args, state, None)
    assert [c.name for c in list_checkpoints(folder)] == ["checkpoint-10"]


def test_a_broken_checkpoint_does_not_count_among_those_that_are_kept(folder):
    """One whose save was cut short after the newest whole one."""
    (folder / "checkpoint-11").mkdir()
    args = SimpleNamespace(output_dir=str(folder))
    CheckpointCallback(keep=2).on_save(args, TrainerState(global_step=10), None)
    assert [c.name for c in list_checkpoints(folder)] == [
        "checkpoint-9", "checkpoint-10", "checkpoint-11"
    ]  # fmt: skip


def save_as_rank(rank: int, folder: Path) -> None:
    """What the Trainer does on a rank; the second is late with its file."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )
    time.sleep(0.5 * rank)
    (folder / "checkpoint-1" / f"rng_state_{rank}.pth").write_bytes(b"state")
    state = TrainerState(global_step=1, is_world_process_zero=rank == 0)
    CheckpointCallback().on_save(SimpleNamespace(output_dir=str(folder)), state, None)
    dist.destroy_process_group()


def test_the_manifest_waits_for_the_files_of_every_rank(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                save_as_rank(rank, tmp_path)
                status = 0
            finally:
                os._exit(status)  # the test session belongs to the parent
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert "rng_state_1.pth" in (tmp_path / "checkpoint-1" / "manifest.json").read_text()


def test_a_checkpoint_of_another_run_is_skipped(tmp_path, capsys):
    for step, run in ((1, "mine"), (2, "other")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("w")
        write_manifest(folder, run)
    assert newest_whole_checkpoint(tmp_path, "mine").name == "checkpoint-1"
    assert "checkpoint-2 (it belongs to another run)" in capsys.readouterr().out
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-2"
