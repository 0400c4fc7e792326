"""RLHF with PPO: SFT -> reward model -> actor-critic RL, on the preference data that DPO uses.

    python recipes/ppo.py                                    tiny model, shipped pairs, 2 cores
    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/ppo.py \\
        --config recipes/configs/ppo_qwen3_0.6b.yaml

Reads pairs, of which it uses the prompts, and a reward model (recipes/reward_model.py); writes the
run folder as recipes/r1_zero.py does. The reward is a completion's score less a KL penalty at each
token. With advantages A by GAE over a critic's values and r the ratio of probabilities, over N
tokens,

    L = -(1/N) sum min(r A, clip(r, 1 - c, 1 + c) A) + value_coef * value loss     1707.06347 Eq. 7

InstructGPT, arXiv 2203.02155; all formulas: posttrain/trainers/ppo.py. Left out: PPO-ptx.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from common import REWARD_MODEL, SFT_MODEL, begin, sampling_of

from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import LookaheadName, ModelConfig, RunConfig


@dataclass(kw_only=True)
class Config(ModelConfig, RunConfig):
    """Settings of recipes/ppo.py."""

    dataset: str = option(
        "data/preferences.jsonl",
        "preference pairs, whose prompts are used: file, folder or Hub name",
    )
    reward_model: str = option(REWARD_MODEL, "folder or Hub name of the reward model")
    template: str = option(
        "alpaca",
        "prompt format, the one that the reward model was trained with: alpaca, chat, plain",
    )
    max_completion_length: int = option(
        64, "longest completion in tokens; longer ones are truncated", at_least=1
    )
    temperature: float = option(1.0, "sampling temperature, in training too", above=0)
    missing_eos_penalty: float = option(
        1.0, "subtracted from the score of a truncated completion", at_least=0
    )
    lookahead: LookaheadName = option(
        "none", "guess tokens to generate faster, with the same completions"
    )
    value_trunk: Literal["own", "shared"] = option(
        "own", "critic: own starts as the reward model, shared is a head on the policy"
    )
    value_clip: float = option(
        0.2, "clip range of values: most that a value may move in one rollout", above=0
    )
    value_learning_rate: float = option(1e-3, "peak learning rate of the critic", above=0)
    clip_range: float = option(
        0.2,
        "clip range: the ratio is clipped at 1 - clip_range and 1 + clip_range",
        above=0,
        at_most=1,
    )
    kl_coef: float = option(
        0.05, "weight in the reward of the KL to the starting model; 0: no reference", at_least=0
    )
    kl_target: float | None = option(
        None, "KL in nats per completion that kl_coef is adapted to; none: kl_coef stays", above=0
    )
    lam: float = option(
        0.95, "GAE's lambda; 1 uses the critic as a baseline only", at_least=0, at_most=1
    )
    epochs: int = option(4, "passes over each rollout", at_least=1)
    minibatches: int = option(1, "optimizer batches that a rollout is divided into", at_least=1)
    model_name_or_path: str = SFT_MODEL
    output_dir: str = "runs/ppo"
    per_device_train_batch_size: int = 128
    max_steps: int = option(80, "optimizer steps", at_least=1)
    learning_rate: float = 1e-4
    warmup_steps: float = 0.05


def main(config: Config):
    """Train by PPO against the reward model, and return the trainer."""
    begin(config, config.reward_model)

    from posttrain.advantages import gae
    from posttrain.data import load_pairs, load_prompts
    from posttrain.data.encode import stop_ids_of
    from posttrain.losses import adaptive_kl_coef, clipped_policy_loss, clipped_value_loss
    from posttrain.models.beside import heads_beside
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.models.reward_model import load_reward, load_reward_model
    from posttrain.rewards.length import missing_eos
    from posttrain.rollouts.options import RolloutOptions, lookahead_of
    from posttrain.rollouts.source import Rollouts
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.ppo import ActorCritic, PPOTrainer

    tokenizer = load_tokenizer(config.model_name_or_path)
    prompts = load_prompts(config.dataset, tokenizer, template=config.template)
    pairs = load_pairs(config.dataset, tokenizer, template=config.template)
    stop_ids, clip = stop_ids_of(config.model_name_or_path, tokenizer), config.clip_range
    model, scorer = load_model(config), replace(config, model_name_or_path=config.reward_model)
    score = load_reward(scorer, tokenizer, centred_on=pairs)
    ended = partial(missing_eos, stop_ids=stop_ids)
    rollouts = Rollouts(
        prompts,
        {"score": (score, 1.0), "missing_eos": (ended, config.missing_eos_penalty)},
        sampling_of(config, tokenizer),
        num_generations=1,
        advantage=None,
        options=RolloutOptions(
            updates_per_rollout=config.minibatches,
            samples_path=Path(config.output_dir) / "samples.jsonl",
            lookahead=lookahead_of(
                config.lookahead, partial(heads_beside, config.model_name_or_path)
            ),
        ),
    )
    control = partial(adaptive_kl_coef, target=config.kl_target, horizon=10_000)
    objective = ActorCritic(
        loss=partial(clipped_policy_loss, clip_low=clip, clip_high=clip),
        value_loss=partial(clipped_value_loss, clip=config.value_clip),
        estimator=partial(gae, gamma=1.0, lam=config.lam),
        kl_coef=config.kl_coef,
        kl_control=control if config.kl_target else None,
        epochs=config.epochs,
    )
    trainer = PPOTrainer(
        model,
        training_arguments(config),
        rollouts,
        objective,
        tokenizer=tokenizer,
        critic=load_reward_model(scorer, tokenizer) if config.value_trunk == "own" else None,
        value_learning_rate=config.value_learning_rate,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
