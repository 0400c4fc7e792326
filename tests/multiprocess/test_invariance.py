"""Ranks, accumulation, engines and adapters change nothing: eight steps of every trainer."""

import itertools

import invariance_jobs
import pytest
import torch
from invariance_jobs import KINDS, STEPS
from ranks import run_ranks
from safetensors.torch import load_file

# World -> (config, ranks, accumulation), the engine that the model must be in, and the kinds of
# trainers that the suite takes; `pytest --every-kind tests/multiprocess/test_invariance.py`, or
# `make invariance`, takes all of them everywhere.
WORLDS = {
    "one process, two passes": (("ddp", 1, 2), ("", None), KINDS),
    "ddp on 4 ranks": (
        ("ddp", 4, 1),
        ("DistributedDataParallel", None),
        ("sft", "kto", "rl", "ppo own", "distill", "online"),
    ),
    "zero1": (("zero1", 2, 2), ("DeepSpeedEngine", 1), ("sft", "ppo shared", "rl lora")),
    "zero2": (("zero2", 2, 1), ("DeepSpeedEngine", 2), ("dpo", "rl", "reward lora")),
    "zero3": (
        ("zero3", 2, 1),
        ("DeepSpeedEngine", 3),
        ("kto", "reward", "prm", "ppo own", "dpo lora", "distill"),
    ),
    "fsdp2": (
        ("fsdp2", 2, 2),
        ("FSDP", None),
        ("dpo", "rl", "ppo own", "reward lora", "distill lora", "online"),
    ),
}
ALSO_LOGGED = {"kl": 1e-3, "kl_per_completion": 1e-3, "kl_coef": 1e-5, "margin": 1e-3,
               "reference_point": 1e-4,
               "explained_variance": 1e-3, "pairs_tied": 1e-9}  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(invariance_jobs.train, world_size=1, folder=str(folder))[0], folder


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    (config, ranks, accumulation), engine, kinds = WORLDS[request.param]
    kinds = KINDS if request.config.getoption("every_kind") else kinds
    folder = tmp_path_factory.mktemp("world")
    results = run_ranks(
        invariance_jobs.train, config=config, world_size=ranks, folder=str(folder),
        accumulation=accumulation, kinds=kinds, timeout_seconds=120,
    )  # fmt: skip
    return engine, results, folder


def test_every_world_trains_as_one_process_does(world, one_process):
    """Losses and relative gradient norms to 2e-6; whitening, KL control and saves see all ranks."""
    (engine, stage), ranks, folder = world
    for results, kind in itertools.product(ranks, ranks[0]):
        found, expected = results[kind], one_process[0][kind]
        assert len(found["loss"]) == len(found["grad_norm"]) == STEPS
        assert found["engine"].startswith(engine)
        assert found["stage"] == stage
        assert found["loss"] == pytest.approx(expected["loss"], abs=2e-6, rel=0), kind
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-6, abs=0), kind
        for name, relative in ALSO_LOGGED.items():
            assert found[name] == pytest.approx(expected[name], rel=relative, abs=2e-6), kind
    for kind in ranks[0]:
        saved = saved_weights(folder / kind / "model")
        reference = saved_weights(one_process[1] / kind / "model")
        assert saved.keys() == reference.keys()
        assert not any("critic" in name for name in saved)
        for name, weight in saved.items():
            torch.testing.assert_close(weight, reference[name], atol=3e-6, rtol=0)


@pytest.mark.parametrize("kind", ["ppo own", "reward lora"])
def test_a_run_under_fsdp2_is_resumed_exactly(kind, tmp_path):
    """RL's sampler, PPO's critic and a head beside an adapter are in the engine's checkpoint."""
    ranks = run_ranks(invariance_jobs.resume, config="fsdp2", folder=str(tmp_path), kinds=(kind,))
    for results in ranks:
        whole, resumed = results[kind]
        assert resumed[-STEPS // 2 :] == whole[-STEPS // 2 :]
    ends = [saved_weights(tmp_path / kind / name) for name in ("whole", "resumed")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_runs_have_something_to_differ_in(one_process):
    results = one_process[0]
    assert results["ppo own"]["loss"] != results["ppo shared"]["loss"]
    assert results["ppo own"]["kl_coef"][1] > 0.05
    assert max(results["reward"]["grad_norm"]) > 0.1
    assert results["sft"]["loss"] != results["sft lora"]["loss"]
    assert max(results["kto"]["reference_point"]) > 0.1
    assert 0 < max(results["online"]["pairs_tied"]) < 1


def saved_weights(folder):
    """The tensors of a saved model or adapter."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)
