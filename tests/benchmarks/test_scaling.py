"""The jobs of the scaling benchmark run, on the smallest of their points."""

import pytest

from benchmarks import child, scaling
from benchmarks.child import Job
from benchmarks.workload import SIZES, model_folder


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of the tiny model that runs in this process."""
    monkeypatch.setattr("benchmarks.workload.ROOT", tmp_path)
    monkeypatch.setattr(scaling, "run_child", lambda job, _config: child.call(job))
    folder = tmp_path / "scaling"
    folder.mkdir()
    model = str(model_folder(SIZES["tiny"], None))
    return Job("", {}, model, "", str(folder), "float32", batch_size=1, steps=1)


def test_a_packed_step_and_a_dpo_step_are_measured(job):
    config = scaling.Config(rounds=1, steps=1)
    packed = scaling.packed_point(job, 2 * scaling.DOCUMENT, config)
    assert packed["seconds"] > 0
    dpo = scaling.dpo_point(job, 8, config)
    assert (dpo["tokens"], dpo["seconds"] > 0) == (2 * 8 * scaling.PAIRS, True)
