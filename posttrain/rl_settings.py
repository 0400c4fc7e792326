"""Settings and inputs that recipes share which draw answers: prompts, rewards, sampling.

class Config(RLConfig): …
trainer = RLTrainer(load_model(config), training_arguments(config), **rl_inputs(config, rewards), …)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.config import option
from posttrain.errors import ConfigError
from posttrain.settings import ModelConfig, RunConfig
from posttrain.stages import BASE_MODEL


@dataclass(kw_only=True)
class AnswerConfig:
    """Which prompts are answered, how answers are drawn, and what they are worth by rule."""

    dataset: str = option("data/problems.jsonl", "problems: file, folder or Hub name")
    template: str = option("r1_zero", "prompt format: r1_zero, chat, plain, …")
    max_prompt_length: int = option(512, "longest prompt in tokens; longer: dropped", at_least=1)
    max_completion_length: int = option(64, "longest answer in tokens; longer: cut", at_least=1)
    answers_per_prompt: int = option(16, "answers G drawn to each prompt", at_least=2)
    temperature: float = option(1.0, "sampling temperature, in training too", above=0)
    reward: str = option("math", "accuracy: math, code, exact, choice, FILE.py:FUNCTION")
    format_weight: float = option(0.2, "weight of the format reward; the answer's is 1", at_least=0)
    overlong_tokens: int = option(0, "last tokens of an answer that cost, up to 1", at_least=0)
    reward_timeout: float = option(30.0, "seconds for a prompt's answers, or for one", above=0)
    reward_workers: int | None = option(None, "processes for rewards; 0: in this one", at_least=0)


@dataclass(kw_only=True)
class RLConfig(AnswerConfig, ModelConfig, RunConfig):
    eval_dataset: str | None = option("data/heldout.jsonl", "held-out problems, for eval_steps")
    model_name_or_path: str = BASE_MODEL
    per_device_train_batch_size: int = 128
    max_steps: int = option(80, "optimizer steps", at_least=1)
    learning_rate: float = 1e-4
    warmup_steps: float = 0.05


@dataclass(kw_only=True)
class GroupConfig(RLConfig):
    """Adds how groups are drawn and chosen, and what bounds a step, whatever the algorithm."""

    updates_per_rollout: int = option(1, "optimizer steps for each rollout", at_least=1)
    max_refills: int = option(0, "rounds that replace groups without spread", at_least=0)
    drop_truncated: bool = option(False, "answers that were cut do not train")
    top_p: float = option(1.0, "draw from the most likely tokens of this share", above=0, at_most=1)
    top_k: int = option(0, "draw from so many most likely tokens; 0: all", at_least=0)
    max_step_kl: float | None = option(None, "nats a token may move in one step", above=0)
    reference_sync_steps: int = option(0, "steps after which the reference moves; 0: never")


def rule_rewards(config: AnswerConfig) -> dict[str, tuple[Any, float]]:
    """Accuracy by `--reward`, the think/answer format, and DAPO's overlong penalty if asked for.

    Raises ConfigError; loads no torch.
    """
    from posttrain.rewards.choice import choice_reward, exact_match_reward
    from posttrain.rewards.code import code_reward
    from posttrain.rewards.files import load_reward
    from posttrain.rewards.format import think_answer_format
    from posttrain.rewards.length import soft_overlong_reward
    from posttrain.rewards.math import math_reward

    known = {
        "math": math_reward,
        "code": code_reward,
        "exact": exact_match_reward,
        "choice": choice_reward,
    }
    # Rewards read the answer alone: they must know if the prompt already holds <think>.
    prefilled = config.template == "r1_zero_think"
    accuracy = load_reward(config.reward, known, prefilled_think=prefilled)
    well_formed = partial(think_answer_format, prefilled_think=prefilled)
    rewards = {"accuracy": (accuracy, 1.0), "format": (well_formed, config.format_weight)}
    if config.overlong_tokens > config.max_completion_length:
        raise ConfigError(
            f"--overlong_tokens: expected at most the {config.max_completion_length} tokens of the "
            f"longest answer, found {config.overlong_tokens}."
        )
    if config.overlong_tokens:
        limits = {
            "max_tokens": config.max_completion_length,
            "cache_tokens": config.overlong_tokens,
        }
        rewards["overlong"] = (partial(soft_overlong_reward, **limits), 1.0)
    return rewards


def kimi_rewards(config: Any) -> dict[str, tuple[Any, float]]:
    """`rule_rewards`, Kimi's length reward from `--length_start_step` on, and a penalty for loops.

    config: an RLConfig with the fields of recipes/kimi_k15.py. Raises ConfigError; loads no torch.
    """
    from posttrain.rewards.length import kimi_length_with_warmup
    from posttrain.rewards.repetition import loop_penalty

    rewards = rule_rewards(config)
    accuracy, _ = rewards["accuracy"]
    if config.length_weight:
        settings = {"start_step": config.length_start_step, "accuracy": accuracy}
        rewards["length"] = (partial(kimi_length_with_warmup, **settings), config.length_weight)
    if config.loop_penalty:
        if not config.loop_tokens:
            raise ConfigError("--loop_penalty: expected --loop_tokens, which says what a loop is.")
        penalty = partial(loop_penalty, num_tokens=config.loop_tokens)
        rewards["loop"] = (penalty, config.loop_penalty)
    return rewards


def rl_inputs(config: RLConfig, rewards: Mapping[str, tuple[Any, float]]) -> dict[str, Any]:
    """What RLTrainer needs besides a model and an algorithm; says what was found in the data."""
    from posttrain.data import load_prompts
    from posttrain.data.encoding import Encoder
    from posttrain.models.loading import load_tokenizer
    from posttrain.rewards.scoring import Scoring
    from posttrain.rollouts.sampling import Sampling

    tokenizer = load_tokenizer(config.model_name_or_path)
    settings = {"template": config.template, "max_prompt_length": config.max_prompt_length}
    prompts, eval_prompts = load_prompts(config.dataset, tokenizer, **settings), None
    if config.eval_steps:
        eval_prompts = load_prompts(config.eval_dataset, tokenizer, split="test", **settings)
    stop_ids = tuple(Encoder(tokenizer).end_ids)
    return {
        "prompts": prompts,
        "eval_prompts": eval_prompts,
        "tokenizer": tokenizer,
        "rewards": rewards,
        "scoring": Scoring(
            timeout_seconds=config.reward_timeout, num_workers=config.reward_workers
        ),
        "sampling": Sampling(config.max_completion_length, stop_ids, config.temperature),
        "answers_per_prompt": config.answers_per_prompt,
        "samples_path": Path(config.output_dir) / "samples.jsonl",
        "max_tokens_per_microbatch": config.max_tokens_per_microbatch,
    }


def group_inputs(config: GroupConfig, rewards: Mapping[str, tuple[Any, float]]) -> dict[str, Any]:
    """`rl_inputs`, and what the settings of GroupConfig ask for."""
    from posttrain.rollouts.loader import Selection
    from posttrain.trainers.trust import guards

    inputs = rl_inputs(config, rewards)
    return {
        **inputs,
        "sampling": replace(inputs["sampling"], top_p=config.top_p, top_k=config.top_k),
        "selection": Selection(config.max_refills, "accuracy", config.drop_truncated),
        "updates_per_rollout": config.updates_per_rollout,
        "callbacks": guards(config.max_step_kl, config.reference_sync_steps),
    }
