"""What the ranks of test_partial run: partial rollouts, a prompt sampler, optimizer resets."""

import os

from tests.conftest import EOS, make_model, make_tokenizer
from tests.trainers.tiny import (
    BATCH,
    arguments,
    even_share,
    logged,
    partial_trainer,
    prompts,
    weights,
)

ACCUMULATION, UPDATES, STEPS = 2, 2, 8


def start(folder: str):
    """A trainer for this rank, with completions of up to three rollouts, saved after four steps."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from posttrain.advantages import dr_grpo_advantages
    from posttrain.losses import kimi_policy_loss
    from posttrain.rollouts.partial import Parts
    from posttrain.rollouts.prompts import PrioritizedSampler
    from posttrain.rollouts.sampling import Sampling
    from posttrain.trainers.callbacks import OptimizerReset

    # The run before this one in the same process is over; the process group stays.
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    model, world_size = make_model(), int(os.environ.get("WORLD_SIZE", "1"))
    args = arguments(
        folder, max_steps=STEPS, gradient_accumulation_steps=ACCUMULATION, learning_rate=3e-3,
        per_device_train_batch_size=BATCH["rl"] // world_size // ACCUMULATION,
        save_strategy="steps", save_steps=4,
    )  # fmt: skip
    trainer = partial_trainer(
        model, args, prompts=prompts(60), tokenizer=make_tokenizer(), num_generations=4,
        rewards={"even": (even_share, 1.0)}, sampling=Sampling(10, (EOS, *range(2, 20))),
        advantage=dr_grpo_advantages, loss=kimi_policy_loss, per="sequence", success_of="even",
        updates_per_rollout=UPDATES, parts=Parts(4, 1),
        sampler=lambda rows: PrioritizedSampler(len(rows), seed=0),
        callbacks=[OptimizerReset(UPDATES)],
    )  # fmt: skip
    if trainer.is_deepspeed_enabled:
        # Nothing in a tiny model is over the size from which ZeRO-3 lets go of a parameter.
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    return trainer


def train(_rank: int, *, folder: str, resume: bool = False) -> dict:
    """What came of it on this rank; resume: of the last four steps, too, from the checkpoint."""
    trainer = start(folder)
    trainer.train()
    trainer.save_model(f"{folder}/model")
    result = _result(trainer)
    if resume:
        again = start(folder)
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
        result["resumed"] = _result(again)
    return result


def _result(trainer) -> dict:
    sharded = hasattr(next(trainer.model.parameters()), "ds_tensor")
    answers = {g.position: [c.token_ids for c in g.completions] for g in trainer.rollouts.open}
    return {
        "weights": None if sharded else weights(trainer.model),
        "open": answers,
        "sampler": trainer.rollouts.prompt_sampler.state_dict(),
        **{name: logged(trainer, name) for name in
           ("loss", "reward", "unfinished_completions", "finished_groups", "on_policy_tokens")},
    }  # fmt: skip
