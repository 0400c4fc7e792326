"""R1-Zero: reinforcement learning from rule rewards alone, on a base model.

    python recipes/r1_zero.py                                tiny model, shipped problems, 2 cores
    python recipes/r1_zero.py --reward code --dataset data/code_problems.jsonl
    python recipes/r1_zero.py --reward my_rewards.py:my_reward --dataset my.jsonl
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/r1_zero.py \\
        --config recipes/configs/r1_zero_qwen2.5_1.5b.yaml

Reads problems (question, and answer or tests), writes the run folder: config.yaml, env.json,
metrics.jsonl, samples.jsonl, model/. For each prompt G completions, with rewards R_i = accuracy +
format,

    A_i = (R_i - mean R) / (std R + 1e-4)                          GRPO, arXiv 2402.03300
    L = -(1/N) sum_i sum_t min(r A_i, clip(r, 1 - 0.2, 1 + 0.28) A_i)   DAPO, arXiv 2503.14476 Eq. 8

with r the ratio of a token's probability to its probability at sampling and N the tokens of the
whole optimizer batch; `--beta` adds the k3 estimate of KL(pi || pi_ref). R1-Zero: arXiv 2501.12948.
Left out: dynamic sampling, overlong filtering, a moving reference: recipes/grpo.py has them.
"""

from dataclasses import dataclass
from functools import partial

from common import RolloutConfig, begin, choose_engine, make_rollouts, rule_rewards

from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import RLConfig


@dataclass(kw_only=True)
class Config(RolloutConfig, RLConfig):
    """Settings of recipes/r1_zero.py."""

    clip_low: float = option(
        0.2, "lower clip range: the ratio is clipped at 1 - clip_low", above=0, at_most=1
    )
    clip_high: float = option(
        0.28, "upper clip range: the ratio is clipped at 1 + clip_high", above=0
    )
    beta: float = option(0.0, "weight of the KL to the reference; 0: no reference", at_least=0)
    updates_per_rollout: int = option(1, "optimizer steps for each rollout", at_least=1)
    output_dir: str = "runs/r1_zero"


def main(config: Config):
    """Train from rule rewards as the settings say, and return the trainer."""
    rewards = rule_rewards(config)
    begin(config)

    from posttrain.advantages import group_advantages
    from posttrain.losses import clipped_policy_loss, tis_weights
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.rewards.checks import reward_facts
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.objective import Objective
    from posttrain.trainers.rl import RLTrainer

    engine, correction = choose_engine(config, tis_weights)
    tokenizer = load_tokenizer(config.model_name_or_path)
    callbacks, find_heads = [], None
    if config.train_heads:
        from posttrain.trainers.heads_along import HeadsAlong

        callbacks = [HeadsAlong(config.model_name_or_path)]
        find_heads = callbacks[0].find
    rollouts = make_rollouts(
        config,
        rewards,
        tokenizer,
        advantage=group_advantages,
        engine=engine,
        find_heads=find_heads,
    )
    loss = partial(clipped_policy_loss, clip_low=config.clip_low, clip_high=config.clip_high)
    objective = Objective(loss, per="token", beta=config.beta, correction=correction)
    trainer = RLTrainer(
        load_model(config),
        training_arguments(config),
        rollouts,
        objective,
        tokenizer=tokenizer,
        callbacks=callbacks,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    fit(trainer, config, facts=reward_facts(rewards))
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
