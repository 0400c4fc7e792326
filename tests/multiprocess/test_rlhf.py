"""Reward models and PPO on two ranks: each engine trains as one process does, critic included."""

import pytest
import rlhf_jobs
import torch
from ranks import run_ranks
from safetensors.torch import load_file

ENGINES = ("ddp", "zero2", "zero3")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(rlhf_jobs.train, world_size=1, folder=str(folder))[0], folder


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return run_ranks(rlhf_jobs.train, config=request.param, folder=str(folder)), folder


@pytest.mark.parametrize("kind", rlhf_jobs.KINDS)
def test_two_ranks_train_as_one_process_does(kind, engine, one_process):
    """Losses, whitening, the KL coefficient and saved weights: all see both ranks' tokens."""
    expected = one_process[0][kind]
    for results in engine[0]:
        found = results[kind]
        assert found["loss"] == pytest.approx(expected["loss"], abs=5e-6, rel=0)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        for name in ("margin", "kl_per_completion", "kl_coef", "explained_variance"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
    file = f"{kind}/model/model.safetensors"
    saved, reference = (load_file(folder / file) for folder in (engine[1], one_process[1]))
    assert saved.keys() == reference.keys()
    assert not any("critic" in name for name in saved)
    for name, weight in saved.items():
        torch.testing.assert_close(weight, reference[name], atol=1e-5, rtol=0)
    if found["weights"] is not None:
        torch.testing.assert_close(found["weights"], expected["weights"], atol=1e-5, rtol=0)


def test_the_runs_have_something_to_differ_in(one_process):
    results = one_process[0]
    assert results["ppo own"]["loss"] != results["ppo shared"]["loss"]
    assert results["ppo own"]["kl_coef"][1] > 0.05
    assert max(results["reward"]["grad_norm"]) > 0.1
