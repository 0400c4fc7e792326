"""The run folder: nothing lost, nothing mixed, and enough written down to run it again."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.run.folder import (
    append_log,
    check_run,
    close_run,
    fingerprints,
    open_run,
    read_log,
    rewind_log,
)
from posttrain.run.options import load, option
from posttrain.run.settings import ModelConfig, RunConfig


@dataclass
class Config(ModelConfig, RunConfig):
    model_name_or_path: str = "a/model"
    output_dir: str = "runs/x"
    beta: float = option(0.1, "weight of the KL term", above=0)


def finished_run(folder: Path, **settings) -> Path:
    config = Config(output_dir=str(folder), **settings)
    open_run(folder, config)
    append_log(folder / "metrics.jsonl", {"step": 1, "loss": 2.0})
    return folder


def test_a_new_run_writes_its_settings_and_where_it_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/dpo.py", "--beta", "0.3"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = Config(output_dir=f"{tmp_path}/new/run", beta=0.3)
    folder = open_run(config.output_dir, config)
    assert load(Config, ["--config", str(folder / "config.yaml")]) == config
    environment = json.loads((folder / "env.json").read_text())
    assert environment["command"].endswith("recipes/dpo.py --beta 0.3")
    assert environment["packages"]["torch"] == metadata.version("torch")
    assert environment["world_size"] == 2
    assert environment["gpus"] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    assert environment["cpu"]


def test_an_earlier_run_is_moved_aside_and_said(tmp_path, capsys):
    folder = finished_run(tmp_path / "dpo")
    finished_run(folder)
    finished_run(folder, beta=0.5)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{folder} held an earlier run: moved to {folder}.{n}." for n in (1, 2)]
    assert read_log(tmp_path / "dpo.1" / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dpo", "dpo.1", "dpo.2"]


def test_a_run_that_made_nothing_gives_its_place(tmp_path, capsys):
    folder = tmp_path / "dpo"
    open_run(folder, Config(beta=0.2))
    open_run(folder, Config(beta=0.3))
    assert load(Config, ["--config", str(folder / "config.yaml")]).beta == 0.3
    assert [p.name for p in tmp_path.iterdir()] == ["dpo"]
    assert capsys.readouterr().out == ""


def test_a_folder_that_is_no_run_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"--output_dir: .*other files \(thesis\.tex\)"):
        open_run(tmp_path, Config())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="expected a folder, found the file"):
        open_run(tmp_path / "thesis.tex", Config())


def test_a_run_is_not_moved_away_from_under_its_own_input(tmp_path, monkeypatch):
    folder = finished_run(tmp_path / "dpo")
    (folder / "model").mkdir()
    with pytest.raises(ConfigError, match=r"^--model_name_or_path: .* lies in --output_dir"):
        open_run(folder, Config(model_name_or_path=f"{folder}/model"))
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="working directory"):
        open_run(".", Config())
    assert (folder / "metrics.jsonl").exists()


def test_a_resumed_run_stays_in_its_folder_and_notes_the_second_start(tmp_path, capsys):
    folder = finished_run(tmp_path / "dpo", max_steps=5)
    first = json.loads((folder / "env.json").read_text())
    open_run(folder, Config(output_dir=str(folder), max_steps=9, resume=True), resume=True)
    environment = json.loads((folder / "env.json").read_text())
    assert environment["time"] == first["time"]
    assert len(environment["resumed"]) == 1
    assert load(Config, ["--config", str(folder / "config.yaml")]).max_steps == 9
    assert read_log(folder / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert capsys.readouterr().out == ""


def test_resume_without_an_earlier_run_starts_one(tmp_path):
    folder = open_run(tmp_path / "new", Config(resume=True), resume=True)
    assert (folder / "config.yaml").exists()


def test_resume_with_another_learning_rate_is_refused_for_it_would_be_ignored(tmp_path):
    folder = finished_run(tmp_path / "dpo", learning_rate=1e-5)
    with pytest.raises(ConfigError, match=r"^--learning_rate: expected 1e-05 .* found 2e-05"):
        open_run(folder, Config(learning_rate=2e-5), resume=True)


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert open_run(tmp_path / "x", Config()) == tmp_path / "x"
    assert not (tmp_path / "x").exists()


def test_log_lines_are_strict_json_whatever_the_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = {"loss": float("nan"), "kl": [float("inf"), 1.5], "text": "naïve\n"}
    append_log(path, {**record, "reward": torch.tensor(0.5), "step": np.int64(3)})
    assert path.read_text() == (
        '{"loss": null, "kl": [null, 1.5], "text": "naïve\\n", "reward": 0.5, "step": 3}\n'
    )


def test_rewinding_drops_later_steps_and_a_line_cut_by_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_log(path, {"step": step, "loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    rewind_log(path, 2)
    append_log(path, {"step": 3})
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    rewind_log(tmp_path / "absent.jsonl", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_with_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    """The optimizer batch and the order of the data would be others."""
    folder = finished_run(tmp_path / "dpo", max_steps=5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="expected 1 processes as the run was started with"):
        open_run(folder, Config(output_dir=str(folder), resume=True, max_steps=5), resume=True)


def test_facts_of_a_run_stand_in_its_environment(tmp_path):
    open_run(tmp_path / "run", Config(), facts={"rewards": {"accuracy": {"sandbox": "landlock"}}})
    environment = json.loads((tmp_path / "run/env.json").read_text())
    assert environment["rewards"]["accuracy"] == {"sandbox": "landlock"}
    assert "command" in environment


def test_a_log_whose_rewinding_is_interrupted_is_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_log(path, {"step": step})
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        rewind_log(path, 1)
    assert path.read_bytes() == before


def test_a_folder_has_one_writer_until_it_is_closed_or_dies(tmp_path):
    folder = finished_run(tmp_path / "dpo")
    writer = [sys.executable, "-c", WRITER.format(folder=str(folder))]
    done = subprocess.run(writer, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(
        rf"--output_dir: '{folder}' is written by a run that is going on, process {os.getpid()} on "
        rf"{socket.gethostname()}\. .*\n",
        done.stderr,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["dpo"]
    close_run(folder)
    writer[-1] += "\nimport os; os.kill(os.getpid(), 9)"
    assert subprocess.run(writer, check=False).returncode == -9
    open_run(folder, Config())


WRITER = """
from dataclasses import dataclass
from posttrain.run.folder import open_run
from posttrain.run.options import plain_errors
@dataclass
class Config:
    output_dir: str
    resume: bool = False
with plain_errors():
    open_run({folder!r}, Config({folder!r}))
"""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/run", "expected a folder in '.*file', which is a file"),
        ("a" * 300, "cannot be made: File name too long"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused(name, reason, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=f"^--output_dir: .*{reason}"):
        check_run(Config(output_dir=f"{tmp_path}/{name}"))


def test_checking_writes_nothing(tmp_path):
    check_run(Config(output_dir=f"{tmp_path}/new/run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["model_name_or_path", "reward"])
def test_another_content_behind_the_same_path_is_refused_or_said(what, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("model/weights", "mine.py"):
        (tmp_path / name).write_text("before")
    inputs = {"model_name_or_path": f"{tmp_path}/model", "reward": f"{tmp_path}/mine.py:score"}
    settings = {"output_dir": f"{tmp_path}/run", **inputs}
    folder = open_run(settings["output_dir"], Scored(**settings))
    append_log(folder / "metrics.jsonl", {"step": 1})
    open_run(folder, Scored(**settings, resume=True), resume=True)
    path = tmp_path / ("mine.py" if what == "reward" else "model/weights")
    path.write_text("after")
    with pytest.raises(ConfigError, match=f"^--resume: the content of --{what} '.*--allow_changed"):
        open_run(folder, Scored(**settings, resume=True), resume=True)
    open_run(folder, Scored(**settings, resume=True, allow_changed=True), resume=True)
    assert f"--{what}" in capsys.readouterr().out


@dataclass
class Scored(Config):
    reward: str = ""


def test_a_damaged_environment_is_refused(tmp_path):
    folder = finished_run(tmp_path / "dpo")
    (folder / "env.json").write_text('{"command": ')
    with pytest.raises(ConfigError, match=r"env\.json is damaged"):
        open_run(folder, Config(resume=True), resume=True)


def test_a_folder_that_is_called_like_a_setting_is_no_input(tmp_path, monkeypatch):
    """wandb writes into ./wandb all the time."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    assert fingerprints(Config(report_to="wandb")) == {}
