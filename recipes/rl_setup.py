"""Settings and inputs that recipes share which draw answers: prompts, rewards, sampling.

class Config(RLConfig): …
trainer = RLTrainer(load_model(config), training_arguments(config), **rl_inputs(config, rewards), …)

Settings of RL recipes that can draw answers with vLLM, or one rollout ahead.

class Config(RolloutConfig, RLConfig): …
trainer = RLTrainer(load_model(config), …, **rl_inputs(config, rewards),
                    **rollout_inputs(config, tis_weights))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError
from posttrain.run.console import say
from posttrain.run.settings import (
    AnswerConfig,
    GroupConfig,
    RLConfig,
    missing_packages,
)


def rule_rewards(config: AnswerConfig) -> dict[str, tuple[Any, float]]:
    """Accuracy by `--reward`, the think/answer format, and DAPO's overlong penalty if asked for.

    Raises ConfigError; loads no torch.
    """
    from posttrain.rewards.by_name import load_reward
    from posttrain.rewards.choice import choice_reward, exact_match_reward
    from posttrain.rewards.code import code_reward
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
    from posttrain.data.encode import Encoder
    from posttrain.models.load import load_tokenizer
    from posttrain.rewards.call import Scoring
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
        "num_generations": config.num_generations,
        "samples_path": Path(config.output_dir) / "samples.jsonl",
        "max_tokens_per_microbatch": config.max_tokens_per_microbatch,
    }


def group_inputs(config: GroupConfig, rewards: Mapping[str, tuple[Any, float]]) -> dict[str, Any]:
    """`rl_inputs`, and what the settings of GroupConfig ask for."""
    from posttrain.rollouts.source import Selection
    from posttrain.trainers.callbacks import guards

    inputs = rl_inputs(config, rewards)
    return {
        **inputs,
        "sampling": replace(inputs["sampling"], top_p=config.top_p, top_k=config.top_k),
        "selection": Selection(config.max_refills, "accuracy", config.drop_truncated),
        "updates_per_rollout": config.updates_per_rollout,
        "callbacks": guards(config.max_step_kl, config.reference_sync_steps),
    }


def rollout_inputs(
    config: Any, correction: Callable | None, *, where_needed: bool = True
) -> dict[str, Any]:
    """Who draws RLTrainer's answers, and the weights for the difference; says both in one line.

    config: a RolloutConfig and RLConfig. correction: those weights (posttrain.losses: tis_weights,
    …), or None; where_needed: not where the policy of the moment itself draws. Raises ConfigError
    where vLLM is asked for and there is no GPU, or no server.
    """
    who, engine = _choose(config)
    ahead = ", one rollout ahead" if config.overlap_rollouts else ""
    if where_needed and not (engine or ahead):
        correction = None
    name = correction.__name__ if correction else "none"
    say(f"rollout {who}{ahead}; correction of the probabilities: {name}")
    return {
        "engine": engine,
        "overlap_rollouts": config.overlap_rollouts,
        "correction": correction,
    }


def _choose(config: Any) -> tuple[str, Any]:
    """In words, and as RLTrainer's `engine`."""
    from posttrain.rollouts.vllm import check_server, start_vllm

    has_gpu, missing = _has_gpu(), missing_packages()
    if config.rollout == "vllm" and not has_gpu:
        raise ConfigError(
            "--rollout vllm: expected a CUDA GPU, found none. vLLM draws on it, or its server gets "
            "the weights from it. Take --rollout hf."
        )
    if config.rollout == "hf":
        return "by hf, the decode loop on the model", None
    if missing or not has_gpu:
        why = f"no {' and no '.join(missing)}" if missing else "no GPU"
        return f"by hf, the decode loop on the model ({why} here)", None
    settings = {"max_model_length": config.max_prompt_length + config.max_completion_length}
    if config.vllm_mode == "server":
        url = config.vllm_server_base_url.rstrip("/")
        check_server(url)
        settings |= {"mode": "server", "server_base_url": url}
        return f"by vllm, the server at {url}", partial(start_vllm, **settings)
    share = config.vllm_gpu_memory_utilization
    settings["gpu_memory_utilization"] = share
    return f"by vllm, on {share:.0%} of this GPU's memory", partial(start_vllm, **settings)


def _has_gpu() -> bool:
    from posttrain.run.engine import this_device

    return this_device().type == "cuda"
