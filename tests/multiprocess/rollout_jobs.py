"""What the ranks of test_rollouts run: a few RL steps, by the decode loop or by a fake vLLM."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import trainer_jobs

from tests.conftest import make_model
from tests.trainers.tiny import logged

FAKES = str(Path(__file__).parents[1] / "fakes")


def train(rank: int, *, folder: str, model: str, mode: str) -> dict:
    """Who samples, our decode loop or vLLM -> what was sampled, and how training went."""
    own = _train(f"{folder}/hf", None, model)
    sys.path.insert(0, FAKES)
    from posttrain.rollouts.vllm import start_vllm

    engine = partial(start_vllm, max_model_length=64, mode=mode)
    if mode == "server":
        engine = partial(engine, server_base_url=_serve(rank, model))
    return {"hf": own, "vllm": _train(f"{folder}/vllm", engine, model)}


def _serve(rank: int, model: str) -> str:
    """A server in rank 0's process; the other ranks must not need it."""
    if rank > 0:
        return "http://nowhere.invalid"
    from vllm.fake_server import FakeServer, send_from_any_device

    send_from_any_device()
    return FakeServer(model).base_url


def _train(folder: str, engine: object, model: str) -> dict:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from posttrain.losses import tis_weights

    unset_hf_deepspeed_config()  # of the run before: it would make an empty, sharded model
    policy = make_model()
    policy.name_or_path = model
    own = {"correction": tis_weights, "engine": engine}
    trainer = trainer_jobs.start("rl", folder, own, model=policy)
    rollouts, gathers, roll_out = [], [], trainer.rollouts.roll_out

    def watched(*arguments, **settings):
        with _gathered() as places:
            rollout = roll_out(*arguments, **settings)
        gathers.append(places)
        rollouts.append([completion.token_ids for completion in rollout.flat])
        return rollout

    trainer.rollouts.roll_out = watched
    trainer.train()
    return {
        "rollouts": rollouts,
        "gathers": gathers,
        "num_parameters": len(list(trainer.model.parameters())),
        "gap": logged(trainer, "sampler_gap"),
    }


@contextmanager
def _gathered() -> Iterator[list[str]]:
    """A list that gets an entry whenever DeepSpeed gathers parameters: by a context, by a hook."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )

    places: list[str] = []

    def noting(place, original):
        return lambda *arguments, **settings: (
            places.append(place), original(*arguments, **settings)
        )[1]  # fmt: skip

    enter, fetch = GatheredParameters.__enter__, Coordinator.fetch_sub_module
    with (
        patch.object(GatheredParameters, "__enter__", noting("context", enter)),
        patch.object(Coordinator, "fetch_sub_module", noting("hook", fetch)),
    ):
        yield places
