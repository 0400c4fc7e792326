"""Tiny runs of the three trainers: random data and weights that are the same in every process."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.run.settings import ModelConfig, RunConfig
from tests.conftest import EOS, make_model, make_tokenizer, random_ids

STEPS = 3
DOCUMENTS_PER_STEP, PAIRS_PER_STEP = 8, 8
PROMPTS_PER_STEP, NUM_GENERATIONS, MAX_COMPLETION = 4, 4, 10
# Examples of one optimizer step, as per_device_train_batch_size counts them.
BATCH = {"sft": DOCUMENTS_PER_STEP, "dpo": PAIRS_PER_STEP,
         "rl": PROMPTS_PER_STEP * NUM_GENERATIONS}  # fmt: skip
KINDS = tuple(BATCH)


def documents(count: int = STEPS * DOCUMENTS_PER_STEP, *, seed: int = 0):
    """Documents of very different lengths, a part of each trained, all ending in EOS."""
    from datasets import Dataset

    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, answer = (random_ids(draw.randrange(1, 20), draw) for _ in range(2))
        trained = [False] * len(prompt) + [True] * (len(answer) + 1)
        rows.append({"input_ids": [*prompt, *answer, EOS], "trained": trained})
    return Dataset.from_list(rows)


def pairs(count: int = STEPS * PAIRS_PER_STEP, *, seed: int = 0):
    from datasets import Dataset

    draw = random.Random(seed)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: random_ids(draw.randrange(1, 16), draw) for name in columns} for _ in range(count)
    ]
    return Dataset.from_list(rows)


def completions(count: int = STEPS * PAIRS_PER_STEP, *, seed: int = 0):
    """Labelled completions, two of each prompt, one of them good."""
    from datasets import Dataset

    draw = random.Random(seed)
    rows = []
    for place in range(count):
        if place % 2 == 0:
            prompt = random_ids(draw.randrange(1, 16), draw)
        completion = random_ids(draw.randrange(1, 16), draw)
        rows.append({"prompt_ids": prompt, "completion_ids": completion, "label": place % 2 == 0})
    return Dataset.from_list(rows)


def solutions(count: int = 16, *, seed: int = 0):
    """Two solutions a prompt, of two or three steps; a step is right if its last id is even."""
    from datasets import Dataset

    draw = random.Random(seed)
    rows = []
    for place in range(count):
        if place % 2 == 0:
            prompt = random_ids(draw.randrange(1, 12), draw)
        steps = [random_ids(draw.randrange(2, 6), draw) for _ in range(draw.randrange(2, 4))]
        ends = [sum(map(len, steps[: i + 1])) - 1 for i in range(len(steps))]
        labels = [step[-1] % 2 == 0 for step in steps]
        ids = [token for step in steps for token in step]
        rows.append(
            {"prompt_ids": prompt, "completion_ids": ids, "step_ends": ends, "labels": labels}
        )
    return Dataset.from_list(rows)


def prompts(count: int = STEPS * PROMPTS_PER_STEP, *, seed: int = 0):
    """Prompts with a column `target` for rewards to read."""
    from datasets import Dataset

    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = random_ids(draw.randrange(2, 16), draw)
        text = " ".join(map(str, ids))
        rows.append({"prompt_ids": ids, "prompt": text, "target": sum(ids) % 7})
    return Dataset.from_list(rows)


def even_share(completions: list[str], **_: Any) -> list[float]:
    """Reward: the share of even words in a completion."""
    answers = [[int(word) for word in text.split()] for text in completions]
    return [sum(n % 2 == 0 for n in answer) / max(1, len(answer)) for answer in answers]


def arguments(folder: str | Path, **changes: Any):
    """TrainingArguments of STEPS steps on the CPU, logged at each step."""
    from transformers import TrainingArguments

    from posttrain.run.engine import settle_use_cpu

    settle_use_cpu()  # DeepSpeed must not compile anything
    settings = {
        "use_cpu": True,
        "bf16": False,
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        # At the usual 1e-8 Adam turns rounding noise in near-zero gradients into whole steps.
        "adam_epsilon": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


def sft_trainer(model: torch.nn.Module, args: Any, **settings: Any):
    from posttrain.trainers.sft import SFTTrainer

    defaults = {"documents": documents(), "tokenizer": make_tokenizer()}
    return SFTTrainer(model, args, **{**defaults, **settings})


def dpo_trainer(model: torch.nn.Module, args: Any, **settings: Any):
    from posttrain.losses import dpo_loss
    from posttrain.run.options import bind
    from posttrain.trainers.preference import PreferenceTrainer

    loss = bind(dpo_loss, beta=0.1)
    defaults = {"pairs": pairs(), "tokenizer": make_tokenizer(), "loss": loss}
    return PreferenceTrainer(model, args, **{**defaults, **settings})


# Which of the flat settings of `rl_trainer` belong to which part of an RL run.
OBJECTIVE = ("loss", "per", "beta", "kl", "entropy_coef", "correction", "off_policy_mask")
OPTIONS = ("updates_per_rollout", "selection", "scoring", "reward_kl_coef", "engine", "overlap",
           "replay_routing", "samples_path", "lookahead")  # fmt: skip
OF_TRAINER = ("callbacks", "max_tokens_per_microbatch", "tokenizer")


def pick(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the settings that have these names, taken out."""
    return {name: settings.pop(name) for name in names if name in settings}


def here() -> dict[str, Any]:
    """Rewards in this process: a worker would import torch first, for each test file anew."""
    from posttrain.rewards.call import Scoring

    return {"scoring": Scoring(num_workers=0)}


def rollout_defaults() -> dict[str, Any]:
    from posttrain.advantages import group_advantages
    from posttrain.rollouts.sampling import Sampling

    return {
        "prompts": prompts(),
        "rewards": {"even": (even_share, 1.0)},
        "sampling": Sampling(max_tokens=MAX_COMPLETION, stop_ids=(EOS, 2, 3, 4, 5)),
        "num_generations": NUM_GENERATIONS,
        "advantage": group_advantages,
    }


def rl_trainer(model: torch.nn.Module, args: Any, **settings: Any):
    """An RLTrainer from flat settings of its rollouts, their options, objective and trainer."""
    from posttrain.losses import clipped_policy_loss
    from posttrain.rollouts.options import RolloutOptions
    from posttrain.rollouts.source import Rollouts
    from posttrain.trainers.objective import Objective
    from posttrain.trainers.rl import RLTrainer

    objective = Objective(**{"loss": clipped_policy_loss, **pick(settings, OBJECTIVE)})
    options = RolloutOptions(**{**here(), **pick(settings, OPTIONS)})
    own = {"tokenizer": make_tokenizer(), **pick(settings, OF_TRAINER)}
    rollouts = Rollouts(**{**rollout_defaults(), **settings}, options=options)
    return RLTrainer(model, args, rollouts, objective, **own)


ACTOR_CRITIC = ("loss", "value_loss", "estimator", "normalise", "value_coef", "kl_coef",
                "kl_control", "epochs")  # fmt: skip


def ppo_trainer(model: torch.nn.Module, args: Any, *, minibatches: int = 1, **settings: Any):
    """A PPOTrainer from flat settings of its rollouts, objective and trainer."""
    from posttrain.rollouts.options import RolloutOptions
    from posttrain.rollouts.source import Rollouts
    from posttrain.trainers.ppo import ActorCritic, PPOTrainer

    objective = ActorCritic(**pick(settings, ACTOR_CRITIC))
    names = ("critic", "value_learning_rate", "tokenizer", "max_tokens_per_microbatch")
    own = {"tokenizer": make_tokenizer(), **pick(settings, names)}
    options = RolloutOptions(
        **{**here(), "updates_per_rollout": minibatches, **pick(settings, OPTIONS)}
    )
    defaults = {**rollout_defaults(), "num_generations": 1, "advantage": None}
    rollouts = Rollouts(**{**defaults, **settings}, options=options)
    return PPOTrainer(model, args, rollouts, objective, **own)


def partial_trainer(model: torch.nn.Module, args: Any, *, parts: Any, **settings: Any):
    """An RLTrainer over partial rollouts, from flat settings."""
    from posttrain.losses import clipped_policy_loss
    from posttrain.rollouts.partial_source import PartialOptions, PartialRollouts
    from posttrain.trainers.objective import Objective
    from posttrain.trainers.rl import RLTrainer

    objective = Objective(**{"loss": clipped_policy_loss, **pick(settings, OBJECTIVE)})
    names = ("sampler", "success_of", "updates_per_rollout", "samples_path", "scoring",
             "pass_rate_generations", "pass_rate_folder")  # fmt: skip
    options = PartialOptions(parts, **{**here(), **pick(settings, names)})
    own = {"tokenizer": make_tokenizer(), **pick(settings, OF_TRAINER)}
    rollouts = PartialRollouts(**{**rollout_defaults(), **settings}, options=options)
    return RLTrainer(model, args, rollouts, objective, **own)


def trpo_trainer(model: torch.nn.Module, args: Any, **settings: Any):
    """A TRPOTrainer from flat settings of its rollouts, trust region and trainer."""
    import dataclasses

    from posttrain.rollouts.options import RolloutOptions
    from posttrain.rollouts.source import Rollouts
    from posttrain.trainers.trpo import TRPOTrainer, TrustRegion

    names = tuple(field.name for field in dataclasses.fields(TrustRegion))
    region = TrustRegion(**pick(settings, names))
    options = RolloutOptions(**{**here(), **pick(settings, OPTIONS)})
    own = {"tokenizer": make_tokenizer(), **pick(settings, OF_TRAINER)}
    rollouts = Rollouts(**{**rollout_defaults(), **settings}, options=options)
    return TRPOTrainer(model, args, rollouts, region, **own)


def online_dpo_trainer(model: torch.nn.Module, args: Any, **settings: Any):
    """An OnlineDPOTrainer from flat settings of its rollouts, their options, loss and trainer."""
    from posttrain.rollouts.options import RolloutOptions
    from posttrain.trainers.online_dpo import OnlineDPOTrainer, PairObjective, PairRollouts

    objective = PairObjective(**pick(settings, ("loss",)))
    options = RolloutOptions(**{**here(), **pick(settings, OPTIONS)})
    own = {"tokenizer": make_tokenizer(), **pick(settings, OF_TRAINER)}
    defaults = {**rollout_defaults(), "num_generations": 2, "advantage": None}
    rollouts = PairRollouts(**{**defaults, **settings}, options=options)
    return OnlineDPOTrainer(model, args, rollouts, objective, **own)


def remember_rollouts(trainer: Any) -> list:
    """A list that fills with the trainer's rollouts."""
    rollouts, original = [], trainer.rollouts.note

    def note(rollout):
        rollouts.append(rollout)
        original(rollout)

    trainer.rollouts.note = note
    return rollouts


def change_rollouts(trainer: Any, change: Any) -> None:
    """Call `change` with each completion that the trainer's rollouts generate."""
    original = trainer.rollouts.roll_out

    def roll_out(*arguments, **settings):
        rollout = original(*arguments, **settings)
        for completion in rollout.flat:
            change(completion)
        return rollout

    trainer.rollouts.roll_out = roll_out


TRAINERS = {"sft": sft_trainer, "dpo": dpo_trainer, "rl": rl_trainer}


def make_trainer(kind: str, folder: str | Path, *, model: Any = None, trainer: Any = None, **args):
    """A trainer of KINDS; `args` change its TrainingArguments, `trainer` its own settings."""
    # First the model: once arguments ask for ZeRO-3, transformers makes empty, sharded ones.
    model = make_model() if model is None else model
    args = arguments(folder, **{"per_device_train_batch_size": BATCH[kind], **args})
    return TRAINERS[kind](model, args, **(trainer or {}))


def weights(model: torch.nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def logged(trainer: Any, name: str) -> list[float]:
    """The values of a metric, log line by log line."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@dataclass(kw_only=True)
class Config(ModelConfig, RunConfig):
    """The settings that a recipe would have, for runs that go through posttrain.trainers.fit."""

    model_name_or_path: str = "tiny"
    output_dir: str = "run"
    dtype: str = "float32"
    max_steps: int = 4
    learning_rate: float = 1e-2
    logging_steps: int = 1
