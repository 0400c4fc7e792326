"""Partial rollouts on two ranks: each engine trains as one process does, and resumes exactly."""

import partial_jobs
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

ENGINES = ("ddp", "zero3")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(partial_jobs.train, world_size=1, folder=str(folder))[0], folder


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    resume = request.param == "ddp"
    ranks = run_ranks(partial_jobs.train, config=request.param, folder=str(folder), resume=resume)
    return request.param, ranks, folder


def test_two_ranks_train_as_one_process_does(engine, one_process):
    """The same prompts, completions and updates, whoever holds them; optimizers that start anew."""
    expected = one_process[0]
    assert len(expected["open"]) > 2
    for found in engine[1]:
        for name in (
            "loss",
            "reward",
            "unfinished_completions",
            "finished_groups",
            "on_policy_tokens",
        ):
            assert found[name] == pytest.approx(expected[name], abs=1e-5), name
        assert [row for row, _ in found["sampler"]["found"]] == [
            row for row, _ in expected["sampler"]["found"]
        ]
        assert found["sampler"]["busy"] == expected["sampler"]["busy"]
    first, second = (found["open"] for found in engine[1])
    assert not first.keys() & second.keys()
    assert {**first, **second} == expected["open"]
    saved, reference = (
        load_file(folder / "model/model.safetensors") for folder in (engine[2], one_process[1])
    )
    for name, weight in saved.items():
        torch.testing.assert_close(weight, reference[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", ["ddp"], indirect=True)
def test_two_ranks_resume_in_the_middle_of_their_completions(engine):
    """Each from its own file of unfinished completions, bit by bit."""
    for found in engine[1]:
        resumed = found["resumed"]
        assert torch.equal(resumed["weights"], found["weights"])
        assert resumed["loss"] == found["loss"]
        assert resumed["open"] == found["open"]
