"""Kimi k1.5: RL by online mirror descent, with the paper's sampling of prompts and answers.

    python recipes/kimi_k15.py                               tiny model, shipped problems, 2 cores
    python recipes/kimi_k15.py --tokens_per_rollout 4096 --max_completion_length 16384 \\
        --loop_tokens 300 --pass_rate_generations 10 --curriculum_steps 200 --dataset my.jsonl

Reads problems (question, and answer or tests), writes the run folder as recipes/r1_zero.py does.
In an iteration the policy is pi_i; to each prompt k answers, S_j the log-prob of answer j, R_j its
reward,

    L = -(1/k) sum_j [(R_j - mean R) S_j - (tau / 2) (S_j - S_ij)^2]     arXiv 2501.12599 Eq. 3

for `updates_per_rollout` steps, before which the optimizer's state is emptied. R is right + format
+ length, the last from `length_start_step` on. Prompts are drawn by their failure rate, with a
curriculum the easy ones first. An answer may take several iterations; what older policies wrote of
it trains only with `--max_staleness`. docs/rl.md explains the settings and what is logged.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rl_setup import kimi_rewards, load_problems, sampling_of, scoring_of
from tiny_world import make_missing

from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import RLConfig


@dataclass(kw_only=True)
class Config(RLConfig):
    loss: Literal["sequence", "token"] = option(
        "sequence", "log-ratio of whole answers, or per token"
    )
    tau: float = option(0.01, "pull to the iteration's policy, per nat", above=0)
    updates_per_rollout: int = option(2, "optimizer steps of an iteration", at_least=1)
    length_weight: float = option(0.1, "of the length reward; 0: none", at_least=0)
    length_start_step: int = option(60, "step from which length counts", at_least=0)
    tokens_per_rollout: int | None = option(40, "an answer's tokens in an iteration", at_least=1)
    max_staleness: int = option(0, "iterations a trained token may be old", at_least=0)
    loop_tokens: int = option(24, "a loop this long ends an answer; 0: off", at_least=0)
    loop_penalty: float = option(0.0, "taken off the reward of such an answer", at_least=0)
    priority_floor: float = option(0.1, "least weight of a solved prompt", above=0, at_most=1)
    success_prior: float = option(0.5, "success rate of unseen prompts", at_least=0, at_most=1)
    difficulty: str | None = option(None, "column of numbers; none: the pass rate")
    pass_rate_generations: int = option(
        0, "completions to measure pass rates with; 0: off", at_least=0, was="pass_rate_answers"
    )
    curriculum_steps: int = option(0, "steps from easy to hard; 0: none", at_least=0)
    output_dir: str = "runs/kimi_k15"


def main(config: Config):
    rewards = kimi_rewards(config)
    make_missing(config.model_name_or_path)

    from posttrain.advantages import dr_grpo_advantages
    from posttrain.losses import kimi_policy_loss, kimi_token_loss
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.rewards.checks import reward_facts
    from posttrain.rollouts.partial_source import PartialOptions, PartialRollouts, Parts
    from posttrain.rollouts.pass_rates import with_pass_rates
    from posttrain.rollouts.prompts import prompt_sampler
    from posttrain.run.folder import open_run
    from posttrain.trainers.callbacks import OptimizerReset
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.objective import Objective
    from posttrain.trainers.rl import RLTrainer

    updates, run = config.updates_per_rollout, Path(config.output_dir)
    tokenizer = load_tokenizer(config.model_name_or_path)
    prompts, eval_prompts = load_problems(config, tokenizer)
    sampler = partial(
        prompt_sampler,
        seed=config.seed,
        floor=config.priority_floor,
        prior=config.success_prior,
        difficulty=config.difficulty,
        curriculum_rollouts=-(-config.curriculum_steps // updates),
    )
    # Columns that are missing, or too many, are an error before the run begins.
    sampler(with_pass_rates(prompts) if config.pass_rate_generations else prompts)
    options = PartialOptions(
        Parts(config.tokens_per_rollout, config.max_staleness, config.loop_tokens),
        sampler=sampler,
        success_of="accuracy",
        updates_per_rollout=updates,
        samples_path=run / "samples.jsonl",
        scoring=scoring_of(config),
        pass_rate_generations=config.pass_rate_generations,
        pass_rate_folder=run.parent / "pass_rates",
    )
    rollouts = PartialRollouts(
        prompts,
        rewards,
        sampling_of(config, tokenizer),
        num_generations=config.num_generations,
        advantage=dr_grpo_advantages,  # R - mean R
        eval_prompts=eval_prompts,
        options=options,
    )
    loss = kimi_policy_loss if config.loss == "sequence" else kimi_token_loss
    objective = Objective(partial(loss, tau=config.tau), per=config.loss)
    open_run(config.output_dir, config, resume=config.resume, facts=reward_facts(rewards))
    trainer = RLTrainer(
        load_model(config),
        training_arguments(config),
        rollouts,
        objective,
        tokenizer=tokenizer,
        callbacks=[OptimizerReset(updates)],
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
