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

from rl_setup import kimi_rewards, rl_inputs
from tiny_world import make_missing

from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import RLConfig

# Loss (posttrain.losses), and what it is a mean over; the token form suits long answers.
LOSSES = {"sequence": ("kimi_policy_loss", "sequence"), "token": ("kimi_token_loss", "token")}


@dataclass(kw_only=True)
class Config(RLConfig):
    loss: Literal[tuple(LOSSES)] = option("sequence", "log-ratio of whole answers, or per token")
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
    pass_rate_generations: int = option(0, "answers to measure it with; 0: off", at_least=0)
    curriculum_steps: int = option(0, "steps from easy to hard; 0: none", at_least=0)
    output_dir: str = "runs/kimi_k15"


def main(config: Config):
    rewards = kimi_rewards(config)
    make_missing(config.model_name_or_path)

    from posttrain import losses
    from posttrain.advantages import dr_grpo_advantages
    from posttrain.models.load import load_model
    from posttrain.rewards.checks import reward_facts
    from posttrain.rollouts.partial import PartialRollouts
    from posttrain.rollouts.pass_rates import with_pass_rates
    from posttrain.rollouts.prompts import prompt_sampler
    from posttrain.run.folder import open_run
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.partial import OptimizerReset, PartialRolloutTrainer

    loss, per = LOSSES[config.loss]
    updates = config.updates_per_rollout
    inputs = rl_inputs(config, rewards)
    sampler = partial(
        prompt_sampler, seed=config.seed, floor=config.priority_floor, prior=config.success_prior,
        difficulty=config.difficulty, curriculum_rollouts=-(-config.curriculum_steps // updates),
    )  # fmt: skip
    # Columns that are missing, or too many, are said before the run begins.
    sampler(
        with_pass_rates(inputs["prompts"]) if config.pass_rate_generations else inputs["prompts"]
    )
    parts = PartialRollouts(config.tokens_per_rollout, config.max_staleness, config.loop_tokens)
    parts.check(inputs["sampling"])
    run = open_run(config.output_dir, config, resume=config.resume, facts=reward_facts(rewards))
    trainer = PartialRolloutTrainer(
        load_model(config),
        training_arguments(config),
        **inputs,
        advantage=dr_grpo_advantages,  # R - mean R
        loss=partial(getattr(losses, loss), tau=config.tau),
        per=per,
        updates_per_rollout=updates,
        parts=parts,
        sampler=sampler,
        success_of="accuracy",
        callbacks=[OptimizerReset(updates)],
    )
    if config.pass_rate_generations:
        trainer.add_pass_rates(config.pass_rate_generations, Path(run).parent / "pass_rates")
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
