"""The four methods of recipes/long2short.py, which make completions of a model shorter.

    tune_on_shortest(config, run, rewards)        # -> <config.output_dir>/model

Each takes the recipe's settings, the run folder with the long model's completions
(posttrain.selection) and the rewards that scored them, and writes a model folder.
Source of all four: Kimi k1.5 (arXiv 2501.12599) section 2.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import make_rollouts, rule_rewards

from posttrain.advantages import dr_grpo_advantages
from posttrain.data import load_documents, load_pairs, load_prompts
from posttrain.losses import dpo_loss, kimi_policy_loss
from posttrain.models.load import load_model, load_tokenizer
from posttrain.models.merge import linear, merge_models
from posttrain.rewards.checks import check_rewards
from posttrain.rewards.length import kimi_length
from posttrain.run.folder import open_run
from posttrain.selection.select import PAIRS, RECORDS
from posttrain.trainers.fit import fit, training_arguments
from posttrain.trainers.objective import Objective
from posttrain.trainers.preference import PreferenceTrainer
from posttrain.trainers.rl import RLTrainer
from posttrain.trainers.sft import SFTTrainer

if TYPE_CHECKING:
    from long2short import Config

Rewards = Mapping[str, tuple[Callable[..., Any], float]]


def methods() -> dict[str, Callable[..., None]]:
    """Return the methods by the names that --methods takes."""
    return {
        "merge": merge_with_short,
        "shortest": tune_on_shortest,
        "dpo": prefer_shortest,
        "rl": reinforce_short,
    }


def check_data(config: Config, rewards: Rewards) -> None:
    """Raise ConfigError unless training and evaluation data have the columns of their rewards."""
    tokenizer = load_tokenizer(config.model_name_or_path)
    if "rl" in config.methods:
        rewards = _short_rewards(config)
    for data in (config.dataset, config.eval_dataset):
        prompts = load_prompts(data, tokenizer, template=config.template, say=lambda _: None)
        check_rewards(rewards, prompts.column_names)


def merge_with_short(config: Config, _run: Path, _rewards: Rewards) -> None:
    """Average the weights of the long model and of a short one, without training."""
    open_run(config.output_dir, config, resume=config.resume)
    models = [config.model_name_or_path, config.short_model]
    merge_models(models, f"{config.output_dir}/model", partial(linear, weights=(0.5, 0.5)))


def tune_on_shortest(config: Config, run: Path, _rewards: Rewards) -> None:
    """Fine-tune the long model on its own shortest right completion of each prompt."""
    config = replace(
        config,
        dataset=str(run / RECORDS),
        learning_rate=config.sft_learning_rate,
        max_steps=config.sft_steps,
        eval_steps=0,
    )
    tokenizer = load_tokenizer(config.model_name_or_path)
    documents = load_documents(config.dataset, tokenizer, template=config.template)
    _train(SFTTrainer, config, documents=documents, tokenizer=tokenizer)


def prefer_shortest(config: Config, run: Path, _rewards: Rewards) -> None:
    """Train by DPO: the shortest right completion against longer wrong ones and much longer right
    ones."""
    config = replace(
        config,
        dataset=str(run / PAIRS),
        learning_rate=config.dpo_learning_rate,
        max_steps=config.dpo_steps,
        eval_steps=0,
    )
    tokenizer = load_tokenizer(config.model_name_or_path)
    pairs = load_pairs(config.dataset, tokenizer, template=config.template)
    loss = partial(dpo_loss, beta=config.dpo_beta)
    _train(PreferenceTrainer, config, pairs=pairs, tokenizer=tokenizer, loss=loss)


def reinforce_short(config: Config, _run: Path, _rewards: Rewards) -> None:
    """Train by RL with Kimi's loss, a length reward and a lower limit on completions."""
    rewards = _short_rewards(config)
    config = replace(config, max_completion_length=config.short_completion_length)
    tokenizer = load_tokenizer(config.model_name_or_path)
    rollouts = make_rollouts(config, rewards, tokenizer, advantage=dr_grpo_advantages)
    objective = Objective(kimi_policy_loss, per="sequence")
    _train(RLTrainer, config, rollouts=rollouts, objective=objective, tokenizer=tokenizer)


def _short_rewards(config: Config) -> Rewards:
    """Return the rewards of the RL phase, whose overlong penalty counts from its lower limit."""
    config = replace(config, max_completion_length=config.short_completion_length)
    rewards = rule_rewards(config)
    length = partial(kimi_length, accuracy=rewards["accuracy"][0])
    return {**rewards, "length": (length, config.length_weight)}


def _train(trainer_class: type, config: Config, **inputs: Any) -> None:
    memory = {"max_tokens_per_microbatch": config.max_tokens_per_microbatch}
    trainer = trainer_class(load_model(config), training_arguments(config), **memory | inputs)
    fit(trainer, config)
