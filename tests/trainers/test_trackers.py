"""Samples as tables in trackers, by modules that stand in for the trackers."""

import json
from types import SimpleNamespace

import pytest

from posttrain.trainers.trackers import COLUMNS, SampleTables

SAMPLES = [
    {"step": step, "prompt": f"p{step}", "completion": "c", "reward": 0.5, "rules": {}}
    for step in (1, 2, 3)
]
ROWS = [[step, f"p{step}", "c", 0.5] for step in (1, 2, 3)]


@pytest.fixture
def sent(monkeypatch):
    """What each tracker was given."""
    found = {}

    def module(name):
        keep = {
            "wandb": lambda logs: found.update(wandb=logs["samples"]),
            "trackio": lambda logs: found.update(trackio=logs["samples"].values.tolist()),
        }
        return SimpleNamespace(
            log=keep.get(name),
            Table=lambda columns=None, data=None, dataframe=None: (
                (columns, data) if dataframe is None else dataframe
            ),
            log_table=lambda data, file: found.update(mlflow=(data, file)),
        )

    monkeypatch.setattr("posttrain.trainers.trackers.importlib.import_module", module)
    return found


def finish(folder, names, *, step=3, is_main=True):
    state = SimpleNamespace(global_step=step, max_steps=3, is_world_process_zero=is_main)
    SampleTables(folder, names).on_step_end(None, state, None)


def test_each_tracker_gets_the_samples_as_its_table(sent, tmp_path):
    lines = "".join(json.dumps(sample) + "\n" for sample in SAMPLES)
    (tmp_path / "samples.jsonl").write_text(lines)
    finish(tmp_path, ["tensorboard", "wandb", "trackio", "mlflow"])
    assert sent["wandb"] == ([*COLUMNS], ROWS)
    assert sent["trackio"] == ROWS
    assert sent["mlflow"] == (
        {"step": [1, 2, 3], "prompt": ["p1", "p2", "p3"], "completion": ["c"] * 3,
         "reward": [0.5] * 3}, "samples.json",
    )  # fmt: skip


def test_nothing_is_sent_before_the_end_by_other_ranks_or_without_samples(sent, tmp_path):
    finish(tmp_path, ["wandb"])
    (tmp_path / "samples.jsonl").write_text(json.dumps(SAMPLES[0]) + "\n")
    finish(tmp_path, ["wandb"], step=2)
    finish(tmp_path, ["wandb"], is_main=False)
    finish(tmp_path, ["tensorboard"])
    assert sent == {}
