"""A request to stop saves a checkpoint, and what is resumed from it ends as if nothing had been."""

import os
import resource
import shutil
import signal

import pytest
import torch
from transformers import TrainerCallback

from posttrain.run.checkpoints import newest_whole_checkpoint
from posttrain.run.folder import read_log
from posttrain.run.options import plain_errors
from posttrain.trainers.fit import fit, training_arguments
from tests.conftest import make_model
from tests.trainers.tiny import BATCH, TRAINERS, Config, weights

STEPS = 6


class At(TrainerCallback):
    """Sends this process a signal after some of its steps."""

    def __init__(self, number, *steps):
        self.number, self.steps = number, steps

    def on_step_end(self, _args, state, _control, **_):
        if state.global_step in self.steps:
            os.kill(os.getpid(), self.number)


def run(folder, *callbacks, kind="sft", own=None, **settings):
    config = Config(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH[kind], **settings
    )
    trainer = TRAINERS[kind](make_model(), training_arguments(config), **(own or {}))
    for callback in callbacks:
        trainer.add_callback(callback)
    fit(trainer, config)
    return trainer


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def steps_logged(folder):
    return [line["step"] for line in read_log(folder / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run that nobody stopped."""
    return weights(run(tmp_path_factory.mktemp("whole") / "run").model)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_saves_the_next_step_and_the_resumed_run_ends_the_same(
    name, whole, tmp_path, capsys
):
    number, folder = signal.Signals[name], tmp_path / "run"
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        run(folder, At(number, 2))
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == handler
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"stopped by {name} at step 3/{STEPS}: ")
    assert "--resume" in said
    assert checkpoints(folder) == ["checkpoint-3"]
    assert not (folder / "model").exists()
    resumed = run(folder, resume=True)
    assert torch.equal(weights(resumed.model), whole)
    assert steps_logged(folder) == list(range(1, STEPS + 1))


def test_rl_stops_where_a_rollout_is_used_up(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", At(signal.SIGTERM, 2), kind="rl", own={"updates_per_rollout": 3})
    assert checkpoints(tmp_path / "run") == ["checkpoint-3"]


def test_a_signal_in_the_last_step_ends_nothing(tmp_path):
    run(tmp_path / "run", At(signal.SIGTERM, STEPS - 1, STEPS))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_scheduler_may_ask_for_status_0(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "run", At(signal.SIGTERM, 1), exit_zero_on_stop=True)
    assert stopped.value.code == 0


def test_a_second_ctrl_c_is_obeyed_at_once_and_a_repeated_signal_is_not(tmp_path, monkeypatch):
    """A launcher repeats what the terminal sent to all; a person takes longer."""
    run_to = {"sooner": "checkpoint-2", "later": None}
    monkeypatch.setattr("posttrain.trainers.fit.AT_ONCE_SECONDS", 3600.0)
    for when, expected in run_to.items():
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path / when, At(signal.SIGINT, 1), At(signal.SIGINT, 1))
        assert stopped.value.code == 128 + signal.SIGINT
        assert (tmp_path / when / "checkpoints").exists() == bool(expected)
        monkeypatch.setattr("posttrain.trainers.fit.AT_ONCE_SECONDS", -1.0)


def test_signals_that_are_ignored_stay_ignored(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(tmp_path / "run", At(signal.SIGHUP, 1)).state.global_step == STEPS
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_killed_in_its_last_save_is_resumed_without_a_further_step(whole, tmp_path):
    folder = tmp_path / "run"
    run(folder, save_steps=3)
    shutil.rmtree(folder / "model")
    resumed = run(folder, save_steps=3, resume=True)
    assert resumed.state.global_step == STEPS
    assert torch.equal(weights(resumed.model), whole)
    assert (folder / "model" / "model.safetensors").is_file()
    assert steps_logged(folder) == list(range(1, STEPS + 1))
    assert sum("train_runtime" in line for line in read_log(folder / "metrics.jsonl")) == 1


def test_a_disk_that_takes_no_more_is_one_line_and_the_last_checkpoint_stays(tmp_path, capsys):
    """Played by the limit on the size of files, which Python reports as the system does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fills(TrainerCallback):
        def on_step_end(self, _args, state, _control, **_):
            if state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(SystemExit) as ended, plain_errors():
            run(tmp_path / "run", Fills(), save_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the disk takes no more: " in said
    assert "Traceback" not in said
    assert newest_whole_checkpoint(tmp_path / "run" / "checkpoints").name == "checkpoint-2"
