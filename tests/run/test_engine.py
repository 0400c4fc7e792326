"""What was asked for against what is there, without starting a second process.

The same checks on real ranks are in tests/multiprocess.
"""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from posttrain.errors import ConfigError
from posttrain.run.engine import (
    World,
    asked_world,
    assert_engine_in_place,
    assert_world_as_asked,
    describe_environment,
    half_dtype,
    settle_use_cpu,
)

TWO_RANKS = {"WORLD_SIZE": "2", "RANK": "1"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.fixture
def cpu_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # restored afterwards, whatever the test sets


@pytest.fixture
def gpu_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))


def accelerator(kind, processes=1, rank=0, stage=None):
    """What the checks read of an Accelerator."""
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    return SimpleNamespace(
        distributed_type=kind, num_processes=processes, process_index=rank, state=state
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World(1, 0, "none")),
        ({"WORLD_SIZE": "1", "RANK": "0"}, World(1, 0, "none")),
        (TWO_RANKS, World(2, 1, "DDP")),
        ({**TWO_RANKS, **ZERO3}, World(2, 1, "ZeRO-3")),
        ({**TWO_RANKS, "ACCELERATE_USE_DEEPSPEED": "True"}, World(2, 1, "DeepSpeed")),
        ({**TWO_RANKS, "ACCELERATE_USE_FSDP": "true"}, World(2, 1, "FSDP")),
        ({**TWO_RANKS, "ACCELERATE_USE_FSDP": "false"}, World(2, 1, "DDP")),
    ],
)
def test_the_environment_says_what_was_asked_for(environment, expected):
    assert asked_world(environment) == expected


@pytest.mark.usefixtures("cpu_machine")
@pytest.mark.parametrize("environment", [{}, TWO_RANKS, {**TWO_RANKS, **ZERO3}])
def test_without_an_accelerator_the_cpu_is_said_aloud_and_bf16_is_off(environment):
    assert settle_use_cpu(environment)
    assert not half_dtype("auto", environment)


@pytest.mark.usefixtures("gpu_machine")
def test_a_gpu_is_used_in_bf16_unless_the_cpu_is_asked_for():
    assert not settle_use_cpu({})
    assert half_dtype("auto", {})
    assert not settle_use_cpu({**TWO_RANKS, "ACCELERATE_USE_FSDP": "true"})
    assert settle_use_cpu({"ACCELERATE_USE_CPU": "True"})
    assert not half_dtype("auto", {"ACCELERATE_USE_CPU": "True"})


@pytest.mark.usefixtures("cpu_machine")
@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        ({**TWO_RANKS, **ZERO3, "ACCELERATE_USE_CPU": "True"}, "Unset ACCELERATE_USE_CPU"),
        ({**TWO_RANKS, "ACCELERATE_USE_FSDP": "true"}, "accelerate_configs/zero3.yaml"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "accelerate_configs/ddp.yaml --num_processes 2",
        ),
    ],
)
def test_launches_that_accelerate_would_quietly_change_are_refused(environment, remedy):
    with pytest.raises(ConfigError, match=remedy):
        settle_use_cpu(environment)


@pytest.mark.usefixtures("cpu_machine")
def test_deepspeed_on_a_cpu_compiles_nothing():
    deepspeed_torch = pytest.importorskip("deepspeed.comm.torch")
    settle_use_cpu({**TWO_RANKS, **ZERO3})
    assert deepspeed_torch.build_shm_op() is None


def test_a_world_as_asked_passes():
    assert_world_as_asked(accelerator(DistributedType.NO), {})
    assert_world_as_asked(accelerator(DistributedType.MULTI_CPU, 2, 1), TWO_RANKS)
    assert_world_as_asked(
        accelerator(DistributedType.DEEPSPEED, 2, 1, stage=3), {**TWO_RANKS, **ZERO3}
    )
    stage_in_file = {**TWO_RANKS, "ACCELERATE_USE_DEEPSPEED": "true"}
    assert_world_as_asked(accelerator(DistributedType.DEEPSPEED, 2, 1, stage=2), stage_in_file)


@pytest.mark.parametrize(
    ("found", "environment", "said"),
    [
        # Two ranks, each of which would be rank 0 of 1.
        ((DistributedType.NO, 1, 0), TWO_RANKS, "rank 1 of 2, engine DDP.*rank 0 of 1"),
        ((DistributedType.DEEPSPEED, 1, 0, 3), {**TWO_RANKS, **ZERO3}, "rank 0 of 1"),
        # The engine was dropped, or is another one.
        ((DistributedType.MULTI_CPU, 2, 1), {**TWO_RANKS, **ZERO3}, "ZeRO-3.*engine DDP"),
        ((DistributedType.DEEPSPEED, 2, 1, 2), {**TWO_RANKS, **ZERO3}, "ZeRO-3.*ZeRO-2"),
        ((DistributedType.MULTI_GPU, 2, 1), {**TWO_RANKS, "ACCELERATE_USE_FSDP": "1"}, "FSDP"),
        ((DistributedType.MULTI_GPU, 2, 0), TWO_RANKS, "rank 1 of 2.*rank 0 of 2"),
    ],
)
def test_another_world_than_asked_for_is_refused(found, environment, said):
    with pytest.raises(ConfigError, match=said):
        assert_world_as_asked(accelerator(*found), environment)


@pytest.mark.parametrize(
    "found",
    [
        accelerator(DistributedType.MULTI_GPU, 2),
        accelerator(DistributedType.DEEPSPEED, 2, stage=2),
        accelerator(DistributedType.FSDP, 2),
    ],
)
def test_a_bare_model_on_several_ranks_is_refused_when_training_begins(found):
    with pytest.raises(ConfigError, match=r"bare Linear.*evaluation before train"):
        assert_engine_in_place(found, nn.Linear(1, 1))


def test_a_bare_model_is_right_for_one_process():
    assert_engine_in_place(accelerator(DistributedType.NO), nn.Linear(1, 1))


def test_a_run_records_the_commit_of_its_checkout():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("this is no checkout")
    assert describe_environment()["git"].removesuffix("-dirty") == found.stdout.strip()
