"""What the ranks of test_invariance run: every kind of trainer, eight steps, however it is cut."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch

from posttrain.packed.prepare import prepare
from posttrain.packed.scalar import prepare_scalar
from tests.conftest import make_model, make_tokenizer
from tests.trainers import tiny
from tests.trainers.tiny import logged

STEPS = 8
MAX_TOKENS = 64  # a step takes several micro-batches, and not as many on each rank
SIZE = {"rl": 16, "online": 16}  # examples of an optimizer step; of all others 8
KINDS = ("sft", "dpo", "kto", "reward", "prm", "rl", "ppo own", "ppo shared", "sft lora",
         "dpo lora", "reward lora", "rl lora", "distill", "distill lora", "online")  # fmt: skip
METRICS = ("loss", "grad_norm", "margin", "reference_point", "kl", "kl_per_completion", "kl_coef",
           "explained_variance", "pairs_tied")  # fmt: skip
SAVES = {"save_strategy": "steps", "save_steps": STEPS // 2}


def train(_rank: int, *, folder: str, accumulation: int = 1, kinds=KINDS) -> dict:
    """Kind -> the engine and what this rank logged; saves a model of each kind."""
    found = {}
    for kind in kinds:
        trainer = start(kind, f"{folder}/{kind}", accumulation)
        trainer.train()
        trainer.save_model(f"{folder}/{kind}/model")
        engine = trainer.model_wrapped
        found[kind] = {name: logged(trainer, name) for name in METRICS}
        found[kind]["engine"] = type(engine).__name__
        found[kind]["stage"] = getattr(engine, "zero_optimization_stage", lambda: None)()
    return found


def resume(_rank: int, *, folder: str, kinds=KINDS) -> dict:
    """Kind -> the losses of a whole run and those of one resumed in its middle; saves both."""
    found = {}
    for kind in kinds:
        found[kind] = []
        for name, checkpoint in (("whole", None), ("resumed", f"checkpoint-{STEPS // 2}")):
            trainer = start(kind, f"{folder}/{kind}", 1, **SAVES)
            trainer.train(resume_from_checkpoint=checkpoint and f"{folder}/{kind}/{checkpoint}")
            trainer.save_model(f"{folder}/{kind}/{name}")
            found[kind].append(logged(trainer, "loss"))
    return found


def start(kind: str, folder: str | Path, accumulation: int, **settings):
    """A trainer of `kind` for this rank, whose optimizer step is the same in every world."""
    reset()
    by_rows = kind.endswith(" rows")
    kind = kind.removesuffix(" rows")
    name, _, way = kind.partition(" ")
    # First the models: once arguments ask for ZeRO-3, transformers makes empty, sharded ones.
    model = classifier(name) if name in ("reward", "prm") else make_model()
    critic = classifier() if kind == "ppo own" else None
    critic = make_model(seed=1) if kind == "distill" else critic  # its teacher
    for one in (model, critic) if by_rows else ():
        if one is not None:
            ready = prepare_scalar if hasattr(one, "score") else prepare
            ready(one, attn_implementation="rows")
    model = adapted(model, name) if way == "lora" else model
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    args = tiny.arguments(
        folder, max_steps=STEPS, gradient_accumulation_steps=accumulation, learning_rate=1e-3,
        per_device_train_batch_size=SIZE.get(name, 8) // ranks // accumulation, **settings,
    )  # fmt: skip
    trainer = make(name, (model, critic), args)
    if trainer.is_deepspeed_enabled:
        # Nothing in a tiny model is over the size from which ZeRO-3 lets go of a parameter.
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    return trainer


def reset() -> None:
    """Forget the run before this one in the same process; the process group stays."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()


def classifier(name: str = "reward") -> torch.nn.Module:
    """A classifier of sequences, or for "prm" of tokens, with one label."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    config = make_model().config
    config.num_labels = 1
    config.token_classification_bias = False
    torch.manual_seed(1)
    of_steps = name == "prm"
    kind = AutoModelForTokenClassification if of_steps else AutoModelForSequenceClassification
    model = kind.from_config(config)
    prepare_scalar(model)
    return model


def adapted(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The model with an adapter; a reward model's head is trained beside it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    head = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if name == "reward" else {}
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian", **head)
    return get_peft_model(model, config)


def make(name: str, models: tuple, args):
    """The trainer called `name` of models = (the one that learns, a critic or None)."""
    from posttrain.losses import kto_loss
    from posttrain.rollouts.sampling import Sampling
    from posttrain.trainers.process_reward import ProcessRewardTrainer
    from posttrain.trainers.reward import RewardTrainer
    from posttrain.trainers.unpaired import UnpairedTrainer

    own = {"tokenizer": make_tokenizer(), "max_tokens_per_microbatch": MAX_TOKENS}
    if name == "sft":
        return tiny.sft_trainer(models[0], args, documents=tiny.documents(STEPS * 8), **own)
    if name == "dpo":
        return tiny.dpo_trainer(models[0], args, pairs=tiny.pairs(STEPS * 8), **own)
    if name == "kto":
        return UnpairedTrainer(models[0], args, completions=tiny.completions(STEPS * 8),
                               loss=partial(kto_loss, weights=(1.0, 0.01)), **own)  # fmt: skip
    if name == "reward":
        return RewardTrainer(models[0], args, pairs=tiny.pairs(STEPS * 8), **own)
    if name == "prm":
        return ProcessRewardTrainer(models[0], args, solutions=tiny.solutions(STEPS * 8), **own)
    if name == "distill":
        return distill_trainer(*models, args, **own)
    if name == "online":
        return tiny.online_dpo_trainer(models[0], args, prompts=tiny.prompts(STEPS * 8),
                                       rewards={"even": (_mostly_even, 1.0)}, **own)  # fmt: skip
    if name == "rl":
        return tiny.rl_trainer(models[0], args, prompts=tiny.prompts(STEPS * 4), beta=0.1,
                               updates_per_rollout=2, **own)  # fmt: skip
    return tiny.ppo_trainer(
        models[0], args, critic=models[1], prompts=tiny.prompts(STEPS * 8),
        rewards={"even": (tiny.even_share, 1.0)}, sampling=Sampling(10, (1, 2, 3, 4, 5)), epochs=2,
        value_learning_rate=3e-3, kl_control=_control, **own,
    )  # fmt: skip


def distill_trainer(model: torch.nn.Module, other: torch.nn.Module | None, args, **own):
    """GKD, half of it on completions by the student; with an adapter, the model without it."""
    from functools import partial

    from posttrain.losses import generalised_jsd_with_slope
    from posttrain.rollouts.sampling import Sampling
    from posttrain.trainers.distill import Distillation, DistillTrainer
    from posttrain.trainers.teachers import AdapterOff, ModelTeacher

    if other is not None:
        prepare(other)
    teacher = AdapterOff() if other is None else ModelTeacher(other)
    plan = Distillation(
        partial(generalised_jsd_with_slope, beta=0.5), nll_weight=0.3, on_policy=0.5,
        sampling=Sampling(10, (1, 2, 3, 4, 5)),
    )  # fmt: skip
    documents = tiny.documents(STEPS * 8)
    return DistillTrainer(model, args, documents=documents, teacher=teacher, plan=plan, **own)


def _mostly_even(completions: list[str], **_) -> list[float]:
    """A reward that often makes a tie, so that ranks have different numbers of pairs."""
    return [float(share > 0.5) for share in tiny.even_share(completions)]


def _control(kl_coef: float, kl: float, *, num_episodes: int) -> float:
    return kl_coef * (1 + 0.1 * kl + 0.01 * num_episodes)
