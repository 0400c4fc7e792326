"""Glue of recipes that have a model answer the prompts of a data set, to select from.

class Config(SamplingConfig): …
prompts, roll_out = prompts_and_sampler(config, rewards)
sample_completions(run / "answers.jsonl", prompts, roll_out, …)      # posttrain.selection
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from common import sampling_of, scoring_of

from posttrain.errors import ConfigError
from posttrain.run.options import option, say
from posttrain.run.settings import CompletionConfig, ModelConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from posttrain.rollouts.group import Prompt, Rollout


@dataclass(kw_only=True)
class SamplingConfig(CompletionConfig):
    """Settings of recipes that sample completions of a data set's prompts."""

    max_prompts: int | None = option(500, "prompts, the data's first; none: all", at_least=1)
    prompts_per_batch: int = option(
        32, "prompts whose completions are sampled, scored and written together", at_least=1
    )


def prompts_and_sampler(
    config: SamplingConfig, rewards: Mapping[str, tuple[Callable[..., Any], float]]
) -> tuple[Dataset, Callable[[Sequence[Prompt], Sequence[int]], Rollout]]:
    """Load the prompts and a model; say what was found in the data.

    Args:
        config: A SamplingConfig with model_name_or_path, dtype and seed.

    Returns:
        The prompts, and f(prompts, seeds) -> scored completions.

    Raises:
        ConfigError: A reward needs a column that the data lacks, or several processes were
            launched, each of which would write the same file.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "completions are sampled by one process: start it with python, not accelerate."
        )

    from posttrain.data import load_prompts
    from posttrain.models.beside import heads_beside
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.rewards.checks import check_rewards
    from posttrain.rollouts.generator import HFGenerator
    from posttrain.rollouts.group import roll_out
    from posttrain.rollouts.options import lookahead_of, without_unscorable

    tokenizer = load_tokenizer(config.model_name_or_path)
    prompts = load_prompts(
        config.dataset,
        tokenizer,
        template=config.template,
        max_prompt_length=config.max_prompt_length,
        keep_source=True,
    )
    check_rewards(rewards, prompts.column_names)
    prompts = prompts.select(range(min(config.max_prompts or len(prompts), len(prompts))))
    model = ModelConfig(model_name_or_path=config.model_name_or_path, dtype=config.dtype)
    sampler = partial(
        roll_out,
        HFGenerator(
            load_model(model),
            lookahead=lookahead_of(
                config.lookahead, partial(heads_beside, config.model_name_or_path)
            ),
        ),
        tokenizer,
        rewards=rewards,
        sampling=sampling_of(config, tokenizer),
        num_generations=config.num_generations,
        scoring=scoring_of(config),
    )
    return without_unscorable(prompts, rewards), lambda batch, seeds: sampler(batch, seeds=seeds)


def describe_sampling(config: SamplingConfig, prompts: Dataset) -> None:
    """Say for `--dry_run` what would be sampled, in how much memory; the data's lines came before.

    config: as for prompts_and_sampler.
    """
    import torch
    from transformers import AutoConfig

    from posttrain.packed.memory import Setup, memory, peak, shape_of
    from posttrain.rollouts.generator import CACHE_BYTES, ROWS_AT_ONCE
    from posttrain.trainers.dry_run import GIB

    completions, batch = len(prompts) * config.num_generations, config.prompts_per_batch
    longest, on_gpu = max(map(len, prompts["prompt_ids"])), torch.cuda.is_available()
    most = longest + config.max_completion_length
    shape = shape_of(AutoConfig.from_pretrained(config.model_name_or_path), half=False)
    rows = min(ROWS_AT_ONCE, batch * config.num_generations)
    cached = min(rows * most, CACHE_BYTES // shape.cache_per_token)
    parts = memory(shape, Setup(tokens=0, trained=0, cached_tokens=cached, on_gpu=on_gpu))
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    say(
        f"steps   {-(-len(prompts) // batch):,} batches of {batch:,} prompts, "
        f"{config.num_generations} completions each: {completions:,}"
    )
    say(f"tokens  at most {completions * config.max_completion_length:,} sampled, {most:,} a row")
    say(f"engine  the decode loop on the model, on {'cuda' if on_gpu else 'cpu'}")
    say(f"memory  about {peak(parts) / GIB:.2f} GiB ({shown})")
    say("dry run: nothing was sampled and nothing written")
