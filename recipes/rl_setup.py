"""What RL recipes share: from their settings to rewards, and to the source of rollouts.

rewards = rule_rewards(config)
engine = choose_engine(config, tis_weights)
rollouts = make_rollouts(config, rewards, tokenizer, advantage=group_advantages)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from posttrain.errors import ConfigError
from posttrain.run.console import say
from posttrain.run.settings import (
    CompletionConfig,
    GroupConfig,
    RLConfig,
    RolloutConfig,
    missing_packages,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from posttrain.rewards.call import Scoring
    from posttrain.rollouts.sampling import Sampling
    from posttrain.rollouts.source import Rollouts

Rewards = dict[str, tuple[Callable[..., Any], float]]


def rule_rewards(config: CompletionConfig) -> Rewards:
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
    # Rewards read the completion alone: they must know if the prompt already holds <think>.
    prefilled = config.template == "r1_zero_think"
    accuracy = load_reward(config.reward, known, prefilled_think=prefilled)
    well_formed = partial(think_answer_format, prefilled_think=prefilled)
    rewards = {"accuracy": (accuracy, 1.0), "format": (well_formed, config.format_weight)}
    longest, penalised = config.max_completion_length, config.overlong_tokens
    if penalised > longest:
        raise ConfigError(
            f"--overlong_tokens: expected at most the {longest} tokens of the longest completion, "
            f"found {penalised}."
        )
    if penalised:
        overlong = partial(soft_overlong_reward, max_tokens=longest, cache_tokens=penalised)
        rewards["overlong"] = (overlong, 1.0)
    return rewards


class KimiRewards(Protocol):
    """The settings of recipes/kimi_k15.py that `kimi_rewards` reads, beside CompletionConfig's."""

    length_weight: float
    length_start_step: int
    loop_penalty: float
    loop_tokens: int


def kimi_rewards(config: KimiRewards) -> Rewards:
    """`rule_rewards`, Kimi's length reward from `--length_start_step` on, and a penalty for loops.

    Raises ConfigError; loads no torch.
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


def load_problems(
    config: RLConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    """Training prompts and, for `--eval_steps`, held-out ones; says what was found in the data."""
    from posttrain.data import load_prompts

    settings = {"template": config.template, "max_prompt_length": config.max_prompt_length}
    prompts = load_prompts(config.dataset, tokenizer, **settings)
    if not config.eval_steps:
        return prompts, None
    return prompts, load_prompts(config.eval_dataset, tokenizer, split="test", **settings)


def sampling_of(config: CompletionConfig, tokenizer: PreTrainedTokenizerBase) -> Sampling:
    """How completions are generated."""
    from posttrain.data.encode import Encoder
    from posttrain.rollouts.sampling import Sampling

    restricted = {}
    if isinstance(config, GroupConfig):
        restricted = {"top_p": config.top_p, "top_k": config.top_k}
    stop_ids = tuple(Encoder(tokenizer).end_ids)
    return Sampling(config.max_completion_length, stop_ids, config.temperature, **restricted)


def scoring_of(config: CompletionConfig) -> Scoring:
    """How rewards are called."""
    from posttrain.rewards.call import Scoring

    return Scoring(timeout_seconds=config.reward_timeout, num_workers=config.reward_workers)


def make_rollouts(
    config: RLConfig,
    rewards: Rewards,
    tokenizer: PreTrainedTokenizerBase,
    *,
    advantage: Callable[..., Any],
    engine: Callable[..., Any] | None = None,
    reward_kl_coef: float = 0.0,
) -> Rollouts:
    """Make the source of an RL run's groups from a recipe's settings."""
    from posttrain.rollouts.options import RolloutOptions, Selection
    from posttrain.rollouts.source import Rollouts

    selection = Selection()
    if isinstance(config, GroupConfig):
        selection = Selection(config.max_refills, "accuracy", config.drop_truncated)
    prompts, eval_prompts = load_problems(config, tokenizer)
    return Rollouts(
        prompts,
        rewards,
        sampling_of(config, tokenizer),
        num_generations=config.num_generations,
        advantage=advantage,
        eval_prompts=eval_prompts,
        options=RolloutOptions(
            updates_per_rollout=getattr(config, "updates_per_rollout", 1),
            selection=selection,
            scoring=scoring_of(config),
            reward_kl_coef=reward_kl_coef,
            engine=engine,
            overlap=getattr(config, "overlap_rollouts", False),
            samples_path=Path(config.output_dir) / "samples.jsonl",
        ),
    )


class Sampler(NamedTuple):
    """Who generates, and the importance-sampling correction that goes with it."""

    engine: Callable[..., Any] | None
    correction: Callable[..., Any] | None


def choose_engine(
    config: RolloutConfig, correction: Callable[..., Any] | None, *, where_needed: bool = True
) -> Sampler:
    """Choose who generates by `--rollout`, and say so in one line.

    Args:
        correction: Importance-sampling weights (posttrain.losses: tis_weights, …), or None.
        where_needed: Leave the correction out where the current policy itself generates.

    Raises:
        ConfigError: vLLM is asked for, and there is no GPU or no server.
    """
    who, engine = _choose(config)
    ahead = ", one rollout ahead" if config.overlap_rollouts else ""
    if where_needed and not (engine or ahead):
        correction = None
    name = correction.__name__ if correction else "none"
    say(f"rollout {who}{ahead}; importance-sampling correction: {name}")
    return Sampler(engine, correction)


def _choose(config: RolloutConfig) -> tuple[str, Callable[..., Any] | None]:
    """Who generates, in words and as `RolloutOptions.engine`."""
    from posttrain.rollouts.vllm import check_server, start_vllm

    has_gpu, missing = _has_gpu(), missing_packages()
    if config.rollout == "vllm" and not has_gpu:
        raise ConfigError(
            "--rollout vllm: expected a CUDA GPU, found none. vLLM generates on it, or its server "
            "gets the weights from it. Take --rollout hf."
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
