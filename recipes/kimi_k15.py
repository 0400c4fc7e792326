"""Kimi k1.5: RL by online mirror descent, with the paper's sampling of prompts and completions.

    python recipes/kimi_k15.py                               tiny model, shipped problems, 2 cores
    python recipes/kimi_k15.py --tokens_per_rollout 4096 --max_completion_length 16384 \\
        --loop_tokens 300 --pass_rate_generations 10 --curriculum_steps 200 --dataset my.jsonl

Reads problems (question, and answer or tests), writes the run folder as recipes/r1_zero.py does.
An iteration starts from the policy pi_i and samples k completions of each prompt. With S_j the
log-prob of completion j, S_ij its log-prob by pi_i and R_j its reward, it minimises

    L = -(1/k) sum_j [(R_j - mean R) S_j - (tau / 2) (S_j - S_ij)^2]     arXiv 2501.12599 Eq. 3

in `updates_per_rollout` steps, before which the optimizer's state is reset. R is accuracy + format
+ length, the last from `length_start_step` on. Prompts are sampled in proportion to their failure
rates; a curriculum starts with the easy ones. A completion may take several iterations; the tokens
that older policies sampled train only with `--max_staleness`. docs/kimi_k15.md explains the
settings and the metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common import Rewards, begin, load_problems, rule_rewards, sampling_of, scoring_of

from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import RLConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.rollouts.partial_source import PartialRollouts


@dataclass(kw_only=True)
class Config(RLConfig):
    """Settings of recipes/kimi_k15.py."""

    loss: Literal["sequence", "token"] = option(
        "sequence", "log-ratio of whole completions, or of single tokens"
    )
    tau: float = option(
        0.01, "weight of the pull to the policy of the iteration's start, reward per nat", above=0
    )
    updates_per_rollout: int = option(
        2, "optimizer steps for each rollout, which is one iteration", at_least=1
    )
    length_weight: float = option(0.1, "weight of the length reward; 0: none", at_least=0)
    length_start_step: int = option(
        60, "optimizer step from which the length reward counts", at_least=0
    )
    tokens_per_rollout: int | None = option(
        40, "most tokens of a completion in one rollout; none: no limit", at_least=1
    )
    max_staleness: int = option(
        0, "train tokens that were sampled at most this many rollouts ago", at_least=0
    )
    loop_tokens: int = option(
        24, "tokens of a loop that ends a completion; 0 turns it off", at_least=0
    )
    loop_penalty: float = option(0.0, "subtracted from the reward of such a completion", at_least=0)
    priority_floor: float = option(
        0.1, "weight of a solved prompt; an unsolved one has 1", above=0, at_most=1
    )
    success_prior: float = option(
        0.5, "success rate assumed of prompts not yet seen", at_least=0, at_most=1
    )
    difficulty: str | None = option(None, "column of numbers, small is easy; none: 1 - pass rate")
    pass_rate_generations: int = option(
        0,
        "completions per prompt that measure its pass rate first; 0 turns it off",
        at_least=0,
        was="pass_rate_answers",
    )
    curriculum_steps: int = option(
        0, "optimizer steps until the curriculum admits all prompts; 0: none", at_least=0
    )
    output_dir: str = "runs/kimi_k15"


def partial_rollouts(
    config: Config, rewards: Rewards, tokenizer: PreTrainedTokenizerBase
) -> PartialRollouts:
    """Make the source of the run's groups, with prompts by success rate and partial rollouts."""
    from posttrain.advantages import dr_grpo_advantages
    from posttrain.models.beside import heads_beside
    from posttrain.rollouts.options import lookahead_of
    from posttrain.rollouts.partial_source import PartialOptions, PartialRollouts, Parts
    from posttrain.rollouts.pass_rates import with_pass_rates
    from posttrain.rollouts.prompts import prompt_sampler

    run = Path(config.output_dir)
    prompts, eval_prompts = load_problems(config, tokenizer)
    sampler = partial(
        prompt_sampler,
        seed=config.seed,
        floor=config.priority_floor,
        prior=config.success_prior,
        difficulty=config.difficulty,
        curriculum_rollouts=-(-config.curriculum_steps // config.updates_per_rollout),
    )
    # Columns that are missing, or too many, are an error before the run begins.
    sampler(with_pass_rates(prompts) if config.pass_rate_generations else prompts)
    options = PartialOptions(
        Parts(config.tokens_per_rollout, config.max_staleness, config.loop_tokens),
        sampler=sampler,
        success_of="accuracy",
        updates_per_rollout=config.updates_per_rollout,
        samples_path=run / "samples.jsonl",
        scoring=scoring_of(config),
        max_unscored_share=config.max_unscored_share,
        lookahead=lookahead_of(config.lookahead, partial(heads_beside, config.model_name_or_path)),
        pass_rate_generations=config.pass_rate_generations,
        pass_rate_folder=run.parent / "pass_rates",
    )
    return PartialRollouts(
        prompts,
        rewards,
        sampling_of(config, tokenizer),
        num_generations=config.num_generations,
        advantage=dr_grpo_advantages,  # R - mean R
        eval_prompts=eval_prompts,
        options=options,
    )


def kimi_rewards(config: Config) -> Rewards:
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


def main(config: Config):
    """Train by online mirror descent as the settings say, and return the trainer."""
    rewards = kimi_rewards(config)
    begin(config)

    from posttrain.losses import kimi_policy_loss, kimi_token_loss
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.rewards.checks import reward_facts
    from posttrain.trainers.callbacks import OptimizerReset
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.objective import Objective
    from posttrain.trainers.rl import RLTrainer

    tokenizer = load_tokenizer(config.model_name_or_path)
    rollouts = partial_rollouts(config, rewards, tokenizer)
    loss = kimi_policy_loss if config.loss == "sequence" else kimi_token_loss
    objective = Objective(partial(loss, tau=config.tau), per=config.loss)
    trainer = RLTrainer(
        load_model(config),
        training_arguments(config),
        rollouts,
        objective,
        tokenizer=tokenizer,
        callbacks=[OptimizerReset(config.updates_per_rollout)],
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    fit(trainer, config, facts=reward_facts(rewards))
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
