"""What the ranks of test_rlhf run: a reward model, and PPO with either critic."""

import os

import torch

from tests.conftest import make_model, make_tokenizer
from tests.trainers.tiny import (
    arguments,
    even_share,
    logged,
    pairs,
    ppo_trainer,
    prompts,
    weights,
)

KINDS = ("reward", "ppo own", "ppo shared")
BATCH, ACCUMULATION, MAX_TOKENS = 8, 2, 64
SAMPLED_UNTIL = (1, 2, 3, 4, 5)


def classifier() -> torch.nn.Module:
    from transformers import AutoModelForSequenceClassification

    from posttrain.packed.scalar import prepare_scalar

    config = make_model().config
    config.num_labels = 1
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config)
    prepare_scalar(model)
    return model


def start(kind: str, folder: str):
    """A trainer of `kind` for this rank; a step takes several micro-batches."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # The run before this one in the same process is over; the process group stays.
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    # First the models: once arguments ask for ZeRO-3, transformers makes empty, sharded ones.
    models = (classifier(), None) if kind == "reward" else (make_model(), classifier())
    args = arguments(
        folder, max_steps=4, gradient_accumulation_steps=ACCUMULATION, learning_rate=1e-3,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")) // ACCUMULATION,
    )  # fmt: skip
    settings = {"tokenizer": make_tokenizer(), "max_tokens_per_microbatch": MAX_TOKENS}
    trainer = _trainer(kind, models, args, settings)
    if trainer.is_deepspeed_enabled:
        # Nothing in a tiny model is over the size from which ZeRO-3 lets go of a parameter.
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    return trainer


def _trainer(kind, models, args, settings):
    from posttrain.rollouts.sampling import Sampling
    from posttrain.trainers.reward import RewardTrainer

    if kind == "reward":
        return RewardTrainer(models[0], args, pairs=pairs(32), **settings)
    return ppo_trainer(
        models[0], args, critic=models[1] if kind == "ppo own" else None, prompts=prompts(32),
        rewards={"even": (even_share, 1.0)}, sampling=Sampling(10, SAMPLED_UNTIL), epochs=2,
        value_learning_rate=3e-3, kl_control=_control, **settings,
    )  # fmt: skip


def _control(kl_coef: float, kl: float, *, num_episodes: int) -> float:
    return kl_coef * (1 + 0.1 * kl + 0.01 * num_episodes)


def train(_rank: int, *, folder: str) -> dict:
    """Kind -> what came of training and saving on this rank."""
    results = {}
    for kind in KINDS:
        trainer = start(kind, f"{folder}/{kind}")
        trainer.train()
        trainer.save_model(f"{folder}/{kind}/model")
        sharded = hasattr(next(trainer.model.parameters()), "ds_tensor")
        results[kind] = {
            "weights": None if sharded else weights(trainer.model),
            **{name: logged(trainer, name) for name in ("loss", "grad_norm", "explained_variance",
                                                        "kl_per_completion", "kl_coef", "margin")},
        }  # fmt: skip
    return results
