"""RL on a device: no operator mixes host and device tensors, and learning hardly waits.

The device is played by tests/fakes/device.py. Generation and scoring need the host; the forward and
backward passes of a step do not.
"""

import pytest
import torch

from posttrain.losses import tis_weights
from posttrain.rewards.call import Scoring
from posttrain.rollouts.options import Selection
from posttrain.rollouts.partial import Parts
from posttrain.rollouts.sampling import Sampling
from posttrain.trainers.callbacks import KLGuard
from posttrain.trainers.trpo import TRPOTrainer
from tests.conftest import EOS, make_model
from tests.fakes.device import FakeCuda
from tests.trainers import tiny
from tests.trainers.tiny import arguments, prompts

SMALL = 64  # packed tokens: several micro-batches in each step
HERE = {"scoring": Scoring(num_workers=0), "max_tokens_per_microbatch": SMALL}


def rl(folder, **own):
    steps = 2 if "updates_per_rollout" in own else 1
    args = arguments(folder, max_steps=steps, per_device_train_batch_size=8, optim="sgd")
    return tiny.rl_trainer(make_model(), args, **HERE, **own)


def ppo(folder):
    args = arguments(folder, max_steps=2, per_device_train_batch_size=8, optim="sgd")
    return tiny.ppo_trainer(make_model(), args, epochs=2, **HERE)


def trpo(folder):
    args = arguments(folder, max_steps=1, per_device_train_batch_size=8)
    own = {"num_generations": 4, "cg_iterations": 2, "max_backtracks": 2}
    return tiny.trpo_trainer(make_model(), args, **HERE, **own)


def partial(folder):
    args = arguments(folder, max_steps=2, per_device_train_batch_size=8, optim="sgd")
    own = {"prompts": prompts(24), "updates_per_rollout": 2}
    return tiny.partial_trainer(make_model(), args, parts=Parts(4, 1), **HERE, **own)


RUNS = {
    "grpo": rl,
    "two updates, a reference, a bonus": lambda folder: rl(
        folder, updates_per_rollout=2, beta=0.1, entropy_coef=0.01
    ),
    "top-k, corrected, cut completions left out": lambda folder: rl(
        folder,
        sampling=Sampling(10, (EOS, 2, 3), top_k=20),
        correction=tis_weights,
        selection=Selection(max_refills=1, drop_truncated=True),
    ),
    "a KL in the reward": lambda folder: rl(folder, reward_kl_coef=0.1),
    "a bound on the step": lambda folder: rl(folder, callbacks=[KLGuard(1e-4)]),
    "partial rollouts": partial,
    "ppo": ppo,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_mixes_no_devices(name, tmp_path):
    with FakeCuda() as cuda:
        trainer = RUNS[name](tmp_path)
        trainer.train()
        assert all(cuda.holds(weight) for weight in trainer.model.parameters())
    assert trainer.state.global_step == trainer.args.max_steps


def test_a_trust_region_step_mixes_no_devices(tmp_path, monkeypatch):
    """Along the gradient: the stand-in does not see into torch.func, which Fisher products use."""
    monkeypatch.setattr("posttrain.trainers.trpo.natural_step", lambda _, gradient, **__: gradient)
    monkeypatch.setattr(TRPOTrainer, "_fisher", lambda *_: None)
    with FakeCuda():
        trainer = trpo(tmp_path)
        trainer.train()
    assert trainer.state.global_step == 1


def test_an_objective_does_not_wait_for_the_device(tmp_path):
    """The micro-batches of a step: packing, forward, loss, metrics, backward."""
    with FakeCuda() as cuda:
        trainer = rl(tmp_path, beta=0.1, updates_per_rollout=2, correction=tis_weights)
        waits, original = [], trainer.microbatch_loss

        def watched(model, groups):
            before = len(cuda.syncs)
            loss = original(model, groups)
            waits.extend(cuda.syncs[before:])
            return loss

        trainer.microbatch_loss = watched
        trainer.train()
    assert waits == []


def test_a_host_tensor_in_the_loss_would_be_noticed(tmp_path):
    """The control."""

    def careless(logps, old_logps, advantages, mask):
        return -advantages[:, None] * (logps - old_logps).exp() * mask * torch.ones(mask.shape)

    with FakeCuda(), pytest.raises(RuntimeError, match="two devices"):
        rl(tmp_path, loss=careless).train()
