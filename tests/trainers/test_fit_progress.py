"""Progress: one plain line a log step, a bar on a terminal, everything in metrics.jsonl."""

import io

import pytest
from transformers import TrainerState

from posttrain.run.folder import append_log, read_log
from posttrain.run.options import describe_duration
from posttrain.trainers import fit as progress
from posttrain.trainers.fit import ProgressCallback, describe_metrics


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def state_at(step: int, *, is_main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=150, epoch=0.5, is_world_process_zero=is_main)


def test_a_log_step_is_one_plain_line(tmp_path, clock, capsys):
    """20 steps in 20 s leave 130 s for the other 130: 02:10."""
    callback = ProgressCallback(tmp_path)
    callback.on_train_begin(None, state_at(0), None)
    clock.now += 20
    logs = {"loss": 1.2344, "grad_norm": 3.0, "mean_completion_tokens": 41.2, "kl": 0.00123}
    callback.on_log(None, state_at(20), None, logs={**logs, "tokens_per_second": 12345.4})
    assert capsys.readouterr().out == (
        "step 20/150  loss 1.234  mean completion tokens 41  kl 0.0012  12,345 tokens/s  "
        "02:10 left\n"
    )


def test_every_key_goes_to_the_file_with_step_epoch_and_seconds(tmp_path, clock, capsys):
    callback = ProgressCallback(tmp_path)
    callback.on_train_begin(None, state_at(0), None)
    clock.now += 2.5
    callback.on_log(None, state_at(3), None, logs={"loss": float("nan"), "odd/key": 7})
    callback.on_log(None, state_at(150), None, logs={"train_runtime": 9.0})
    first, second = read_log(tmp_path / "metrics.jsonl")
    assert 0.01 < first.pop("peak_memory_gb") < 100
    assert [first, second] == [
        {"step": 3, "epoch": 0.5, "seconds": 2.5, "loss": None, "odd/key": 7},
        {"step": 150, "epoch": 0.5, "seconds": 2.5, "train_runtime": 9.0},
    ]
    assert capsys.readouterr().out.splitlines() == ["step 3/150  loss nan  02:02 left"]


def test_time_left_of_a_resumed_run_counts_only_its_own_steps(tmp_path, clock, capsys):
    """From step 100, 10 steps in 5 s leave 20 s for the other 40."""
    callback = ProgressCallback(tmp_path)
    callback.on_train_begin(None, state_at(100), None)
    clock.now += 5
    callback.on_log(None, state_at(110), None, logs={"loss": 1.0})
    assert capsys.readouterr().out.endswith("00:20 left\n")


def test_a_resumed_run_rewinds_its_logs_and_a_new_one_does_not(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        for step in (50, 57):
            append_log(tmp_path / name, {"step": step})
    ProgressCallback(tmp_path).on_train_begin(None, state_at(0), None)
    assert len(read_log(tmp_path / "metrics.jsonl")) == 2
    ProgressCallback(tmp_path).on_train_begin(None, state_at(50), None)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert read_log(tmp_path / name) == [{"step": 50}]


def test_other_ranks_say_and_write_nothing(tmp_path, capsys):
    callback = ProgressCallback(tmp_path)
    for step, event in ((0, callback.on_train_begin), (1, callback.on_step_end)):
        event(None, state_at(step, is_main=False), None)
    callback.on_log(None, state_at(1, is_main=False), None, logs={"loss": 1.0})
    callback.on_train_end(None, state_at(1, is_main=False), None)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_a_bar_with_step_metrics_and_time_left(tmp_path, clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    callback = ProgressCallback(tmp_path)
    callback.on_train_begin(None, state_at(0), None)
    clock.now += 20
    callback.on_step_end(None, state_at(20), None)
    callback.on_log(None, state_at(20), None, logs={"loss": 1.2344})
    callback.on_train_end(None, state_at(20), None)
    shown = terminal.getvalue()
    for words in (" 20/150", "loss 1.234", "02:10 left", "━"):
        assert words in shown
    assert "step 20/150" not in shown  # the plain line
    assert callback.bar is None


def test_an_evaluation_outside_of_training_names_no_step(tmp_path, capsys):
    ProgressCallback(tmp_path).on_log(None, TrainerState(), None, logs={"eval_loss": 2.0})
    assert capsys.readouterr().out == "eval loss 2.000\n"


def test_the_line_says_held_out_numbers_apart():
    assert describe_metrics({"eval_accuracy": 0.5, "eval_loss": 2, "loss": 1.0}) == (
        "loss 1.000  eval loss 2.000  eval accuracy 0.500"
    )
    assert describe_metrics({"learning_rate": 1e-5}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00"), (72.4, "01:12"), (3599.6, "1:00:00"), (3723, "1:02:03")]
)
def test_a_duration_reads_as_a_clock(seconds: float, text: str):
    assert describe_duration(seconds) == text
