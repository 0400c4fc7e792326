"""What the ranks of test_trainers run: the tiny runs of tests/trainers, cut over the ranks."""

import os

from tests.trainers import tiny
from tests.trainers.tiny import BATCH, KINDS, logged, make_trainer, weights

# Two rollouts of two steps each: completions come from a trained policy, old log-probs from ours.
RL_STEPS, RL_SETTINGS = 4, {"beta": 0.1, "updates_per_rollout": 2}
ACCUMULATION = {"sft": 1, "dpo": 2, "rl": 2}
DATA = {"sft": "documents", "dpo": "pairs", "rl": "prompts"}
# Packed tokens: a step takes several micro-batches, and not as many on each rank.
MAX_TOKENS = 64


def start(kind, folder, own=None, **settings):
    """A trainer of `kind` for this rank, with 5 held-out examples."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # The run before this one in the same process is over; the process group stays.
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    own = {**(own or {}), f"eval_{DATA[kind]}": getattr(tiny, DATA[kind])(5, seed=9)}
    own["max_tokens_per_microbatch"] = MAX_TOKENS
    if kind == "rl":
        own = {**RL_SETTINGS, "prompts": tiny.prompts(4 * BATCH[kind] // 4), **own}
        settings.setdefault("max_steps", RL_STEPS)
    trainer = make_trainer(
        kind,
        folder,
        trainer=own,
        per_device_train_batch_size=BATCH[kind] // world_size // ACCUMULATION[kind],
        gradient_accumulation_steps=ACCUMULATION[kind],
        per_device_eval_batch_size=2,
        **settings,
    )
    if trainer.is_deepspeed_enabled:
        # Nothing in a tiny model is over the size from which ZeRO-3 lets go of a parameter.
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    return trainer


def train(rank: int, *, folder: str) -> dict:
    """Kind -> what came of evaluating, training, evaluating again and saving on this rank."""
    return {kind: _train(kind, rank, f"{folder}/{kind}") for kind in KINDS}


def _train(kind: str, rank: int, folder: str) -> dict:
    trainer = start(kind, folder)
    rollouts, parts = [], []
    if kind == "rl":
        note = trainer.rollouts.note
        trainer.rollouts.note = lambda rollout: (
            rollouts.append([(p["prompt_ids"], [a.token_ids for a in siblings])
                             for p, siblings in zip(rollout.prompts, rollout.completions,
                                                    strict=True)]),
            note(rollout),
        )  # fmt: skip
    cut = trainer._microbatches
    trainer._microbatches = lambda examples: (parts.append(len(cut(examples))), cut(examples))[1]
    before = trainer.evaluate()
    before.pop("eval_pair_accuracy", None)  # of margins that are 0 up to rounding
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(f"{folder}/model")
    engine, weight = trainer.model_wrapped, trainer.model.model.layers[0].mlp.up_proj.weight
    sharded = hasattr(weight, "ds_tensor")
    return {
        "engine": type(engine).__name__,
        "stage": getattr(engine, "zero_optimization_stage", lambda: None)(),
        "rank": (rank, trainer.accelerator.process_index, trainer.accelerator.num_processes),
        "held": (weight.numel(), weight.ds_tensor.numel()) if sharded else None,
        "weights": None if sharded else weights(trainer.model),
        "losses": logged(trainer, "loss"),
        "grad_norms": logged(trainer, "grad_norm"),
        "kl": logged(trainer, "kl"),
        "evaluations": [before, after],
        "rollouts": rollouts,
        "parts": parts,
    }


def rl_with_guesses(_rank: int, *, folder: str) -> list[dict]:
    """GRPO on one prompt, again and again, plainly and with all guesses of n-grams."""
    from posttrain.rollouts.draft_length import Unlimited
    from posttrain.rollouts.drafts import NGramDrafter
    from posttrain.rollouts.lookahead import Lookahead

    runs = []
    for ahead in (None, Lookahead("ngram", [NGramDrafter()], controller=Unlimited())):
        own = {"lookahead": ahead, "prompts": tiny.prompts(1).select([0] * 8)}
        trainer = start("rl", f"{folder}/{bool(ahead)}", own, max_steps=8)
        trainer.train()
        gained = logged(trainer, "lookahead_tokens_per_step")
        runs.append({"weights": weights(trainer.model), "gained": gained})
    return runs


def train_by_epochs(_rank: int, *, folder: str) -> list[dict]:
    """Two epochs of documents that do not fill the last step: 5 left over, then 3, of 8."""
    runs = []
    for count in (21, 19):
        own = {"documents": tiny.documents(count)}
        trainer = start("sft", f"{folder}/{count}", own, max_steps=-1, num_train_epochs=2)
        trainer.train()
        runs.append({"losses": logged(trainer, "loss"), "weights": weights(trainer.model)})
    return runs


def nan_on_rank_one(rank: int, *, folder: str) -> list[dict]:
    """For each kind: how this rank ends when the loss of rank 1 alone becomes NaN at step 2."""
    from posttrain.trainers.base import NonFiniteLossError

    ends = []
    for kind in KINDS:
        trainer = start(kind, f"{folder}/{kind}", max_steps=4)
        original = trainer.microbatch_loss

        def broken(model, examples, trainer=trainer, original=original):
            bad = rank == 1 and trainer.state.global_step == 1
            return original(model, examples) * (float("nan") if bad else 1.0)

        trainer.microbatch_loss = broken
        before = []
        step = trainer.training_step
        trainer.training_step = lambda *arguments, trainer=trainer, step=step, before=before: (
            before.append(weights(trainer.model)), step(*arguments)
        )[1]  # fmt: skip
        try:
            trainer.train()
        except NonFiniteLossError as error:
            unchanged = bool((before[-1] == weights(trainer.model)).all())
            moved = bool((before[0] != before[-1]).any())
            ends.append({"said": str(error), "unchanged": unchanged, "moved": moved})
        else:
            ends.append({"said": f"{kind} went on"})
    return ends


def signalled_apart(rank: int, *, folder: str) -> list[tuple]:
    """For each kind: where this rank stops if one is asked after step 1, the other after step 3."""
    import signal

    from transformers import TrainerCallback

    from posttrain.trainers.fit import StopCallback

    class Asked(TrainerCallback):
        def on_step_end(self, _args, state, _control, **_):
            if state.global_step == (3 if rank == 0 else 1):
                self.trainer.stop_signal = self.trainer.stop_signal or signal.SIGTERM

    ends = []
    for kind in KINDS:
        trainer = start(kind, f"{folder}/{kind}", max_steps=8)
        Asked.trainer = trainer
        trainer.add_callback(Asked())
        trainer.add_callback(StopCallback(trainer))
        trainer.train()
        ends.append((kind, trainer.state.global_step, trainer.stopped_by))
    return ends


def a_stopped_rank(rank: int, *, folder: str) -> str:
    """What rank 0 says of rank 1, which the kernel stops in its second step."""
    import signal
    from datetime import timedelta

    import torch.distributed as dist

    from posttrain.run import ranks
    from posttrain.run.engine import from_all_ranks

    trainer = start("sft", f"{folder}/sft", max_steps=4)
    pids = from_all_ranks(os.getpid())
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=6))
    step = trainer.training_step

    def stops(*arguments):
        if rank == 1 and trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(*arguments)

    trainer.training_step = stops
    try:
        with ranks.naming_lost_ranks(lambda: trainer.state.global_step):
            trainer.train()
    except ranks.LostRankError as error:
        return str(error)
    finally:
        os.kill(pids[1], signal.SIGCONT)
    return "no error"


def resumed_within_an_epoch(_rank: int, *, folder: str) -> list:
    """The weights after two epochs of steps of 8, 8 and 5, whole and resumed after the first."""
    ends = []
    for checkpoint in (None, f"{folder}/checkpoint-1"):
        own = {"documents": tiny.documents(21)}
        trainer = start("sft", folder, own, max_steps=-1, num_train_epochs=2,
                        save_strategy="steps", save_steps=1)  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(weights(trainer.model))
    return ends


def held_out_samples(_rank: int, *, folder: str) -> tuple[list[dict], str]:
    """The samples of a DPO run's held-out pairs, and what was said."""
    import contextlib
    import io
    from pathlib import Path

    from posttrain.run.folder import read_log
    from posttrain.trainers.held_out_samples import HeldOutSamples

    trainer = start("dpo", folder, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.add_callback(HeldOutSamples(trainer, folder))
    Path(folder).mkdir(exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        trainer.train()
    return read_log(f"{folder}/samples.jsonl"), said.getvalue()
