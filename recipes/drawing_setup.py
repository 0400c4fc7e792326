"""Settings and inputs that recipes share which have a model answer the prompts of a data set.

class Config(DrawingConfig): …
draw_answers(run / "answers.jsonl", **drawing_inputs(config, rewards))
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import ConfigError
from posttrain.run.options import option
from posttrain.run.settings import AnswerConfig, ModelConfig


@dataclass(kw_only=True)
class DrawingConfig(AnswerConfig):
    max_prompts: int | None = option(500, "prompts, the data's first; none: all", at_least=1)
    prompts_per_batch: int = option(32, "prompts answered, scored and written at once", at_least=1)


def drawing_inputs(config: Any, rewards: Mapping[str, tuple[Any, float]]) -> dict[str, Any]:
    """What draw_answers needs; says what was found in the data.

    config: a DrawingConfig with model_name_or_path, dtype and seed. Raises ConfigError where a
    reward needs a column that the data lacks, or several processes were launched, each of which
    would write the same file.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("answers are drawn by one process: start it with python, not accelerate.")

    from posttrain.data import load_prompts
    from posttrain.data.encode import Encoder
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.rewards.call import Scoring
    from posttrain.rewards.checks import check_rewards
    from posttrain.rollouts.generator import HFGenerator
    from posttrain.rollouts.sampling import Sampling
    from posttrain.trainers.rl_checks import without_unscorable

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
    stop_ids = tuple(Encoder(tokenizer).end_ids)
    return {
        "prompts": without_unscorable(prompts, rewards),
        "generator": HFGenerator(load_model(model)),
        "tokenizer": tokenizer,
        "rewards": rewards,
        "scoring": Scoring(
            timeout_seconds=config.reward_timeout, num_workers=config.reward_workers
        ),
        "sampling": Sampling(config.max_completion_length, stop_ids, config.temperature),
        "num_generations": config.num_generations,
        "prompts_per_batch": config.prompts_per_batch,
        "seed": config.seed,
    }
