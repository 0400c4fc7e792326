"""Rejection sampling: sample several completions of each prompt, and keep the good ones as data.

    python recipes/rejection_sampling.py                     tiny model, shipped problems, 2 cores
    python recipes/rejection_sampling.py --keep all_correct --limit 2 --model_name_or_path …
    python recipes/rejection_sampling.py --reward_model runs/reward_model/model
    python recipes/rejection_sampling.py --prm runs/prm/model --prm_aggregate product
    python recipes/rejection_sampling.py --reward my_judge.yaml

Reads problems (question, and answer or tests), with a reward model any prompts; writes the run
folder: config.yaml, env.json, answers.jsonl (all completions with their scores), records.jsonl
(prompt, completion), pairs.jsonl (prompt, chosen, rejected, margin), report.json. A run that was
stopped continues when it is started again, and samples nothing twice. Then, for instance:

    python recipes/sft.py --dataset runs/rejection_sampling/records.jsonl
    python recipes/dpo.py --dataset runs/rejection_sampling/pairs.jsonl

DeepSeek-R1, arXiv 2501.12948 section 2.3.3 (its SFT starts from the base model again); Kimi k1.5,
2501.12599 section 2.4. Left out: several processes.
"""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

from common import JUDGE_FILES, SFT_MODEL, begin, rule_rewards
from sampling_setup import SamplingConfig, describe_sampling, prompts_and_sampler

from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import ModelConfig
from posttrain.selection import rules

# The rules that --keep and --pairs may name.
KEEP = {
    "best": rules.best,
    "shortest": rules.shortest_correct,
    "all_correct": rules.all_correct,
}
PAIRS = {"best_worst": rules.best_against_worst, "shortest_longer": rules.shortest_against_longer}


@dataclass(kw_only=True)
class Config(SamplingConfig):
    """Settings of recipes/rejection_sampling.py."""

    model_name_or_path: str = option(SFT_MODEL, "folder or Hub name of the model that is sampled")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "number format to compute in")
    template: str = "alpaca"
    num_generations: int = 8
    reward_model: str | None = option(
        None, "folder or Hub name of a reward model, whose score replaces all rewards"
    )
    prm: str | None = option(
        None, "folder or Hub name of a process reward model, whose score replaces all rewards"
    )
    prm_aggregate: Literal["min", "product", "last"] = option(
        "min", "one number from the probabilities that steps are right"
    )
    min_reward: float | None = option(
        None, "least accuracy or score that counts as right; none: accuracy 1, any score"
    )
    keep: Literal[tuple(KEEP)] = option(
        "best", "rule for the right completions that become records"
    )
    limit: int | None = option(
        None, "most records per prompt with all_correct; none: 4", at_least=1
    )
    pairs: Literal[tuple(PAIRS)] = option(
        "best_worst", "rule for the completions that become pairs"
    )
    min_margin: float | None = option(
        None, "least difference in reward with best_worst; none: 0.5", at_least=0
    )
    ratio: float | None = option(
        None,
        "with shortest_longer, right completions this many times as long are rejected; none: 1.5",
        above=1,
    )
    seed: int = option(0, "seed of sampling", at_least=0)
    output_dir: str = option("runs/rejection_sampling", "run folder")
    resume: bool = option(True, "continue the run in output_dir; otherwise it is moved aside")
    dry_run: bool = option(False, "say what the run would do, and sample nothing")

    def check(self) -> None:
        """Raise ConfigError where a rule needs to know which scores of a reward model are right."""
        if self.reward_model and self.prm:
            raise ConfigError("prm: expected one scorer, found --reward_model too.")
        scored = self.reward_model or self.prm or self.reward.endswith(JUDGE_FILES)
        any_is_right = scored and self.min_reward is None
        if any_is_right and (self.keep, self.pairs) != ("best", "best_worst"):
            raise ConfigError(
                "min_reward: expected the reward model's, PRM's or judge's score from which a "
                "completion is right; found none. Only best and best_worst do without it."
            )


def main(config: Config) -> dict:
    """Sample, score and select, and return the content of report.json; nothing by --dry_run."""
    rewards = rule_rewards(config)
    begin(config, config.reward_model, config.prm)

    from posttrain.models.load import load_tokenizer
    from posttrain.models.process_reward import load_process_reward
    from posttrain.models.reward_model import load_reward
    from posttrain.run.folder import open_run
    from posttrain.run.options import bind
    from posttrain.selection.sample import sample_completions
    from posttrain.selection.select import ANSWERS, write_selection

    scorer = config.reward_model or config.prm
    part = "score" if scorer else "accuracy"
    right_from = -inf if scorer or config.reward.endswith(JUDGE_FILES) else 1.0
    right_from = right_from if config.min_reward is None else config.min_reward
    keep = bind(KEEP[config.keep], limit=config.limit)
    pair = bind(PAIRS[config.pairs], min_margin=config.min_margin, ratio=config.ratio)
    if scorer:
        judge = ModelConfig(model_name_or_path=scorer, dtype=config.dtype)
        tokenizer = load_tokenizer(config.model_name_or_path)
        if config.prm:
            score = load_process_reward(judge, tokenizer, aggregate=config.prm_aggregate)
        else:
            score = load_reward(judge, tokenizer)
        rewards = {"score": (score, 1.0)}
    prompts, roll_out = prompts_and_sampler(config, rewards)
    if config.dry_run:
        describe_sampling(config, prompts)
        return {}
    sampled = Path(config.output_dir) / ANSWERS
    open_run(config.output_dir, config, resume=config.resume and sampled.exists())
    sample_completions(
        sampled, prompts, roll_out, prompts_per_batch=config.prompts_per_batch, seed=config.seed
    )
    return write_selection(
        sampled.parent, keep=keep, pair=pair, right_by=part, min_reward=right_from
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
