"""GRPO and its relatives: RL from rewards, with the algorithm chosen by name.

    python recipes/grpo.py                                   GRPO, tiny model, shipped problems
    python recipes/grpo.py --algorithm dapo --max_refills 3 --drop_truncated
    python recipes/grpo.py --algorithm gspo --updates_per_rollout 4
    python recipes/grpo.py --prm runs/prm/model --model_name_or_path runs/sft/model \\
        --template alpaca

Reads problems (question, and answer or tests), writes the run folder as recipes/r1_zero.py does.
An algorithm is an advantage of a prompt's G completions, a loss per token, and what the loss is a
mean over: the table `algorithms` below. The formulas stand with the functions, in
posttrain/advantages.py and posttrain/losses/; docs/rl_algorithms.md says which to choose when. With
--prm a process reward model rewards each step, and takes the place of rewards and advantage
(DeepSeekMath, arXiv 2402.03300 section 4.1.3); accuracy and format are only logged.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from common import (
    Rewards,
    RolloutConfig,
    begin,
    choose_engine,
    have_images,
    make_rollouts,
    rule_rewards,
)

from posttrain.errors import ConfigError
from posttrain.run.options import bind, option, parse, plain_errors
from posttrain.run.settings import GroupConfig

Name = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "lite_ppo",
    "dual_clip",
    "two_sided",
    "gspo",
    "gspo_token",
    "cispo",
    "rloo",
    "reinforce",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "dppo_tv",
    "dppo_kl",
    "kimi",
    "kimi_token",
]
KL = Literal["k1", "k2", "k3", "k3+"]
Correction = Literal["auto", "none", "tis", "icepop", "sequence_tis", "sequence_mask"]


class Algorithm(NamedTuple):
    """An advantage, a loss, and what the loss is a mean over."""

    advantage: Callable[..., Any]
    loss: Callable[..., Any]
    per: Literal["token", "sequence", "constant"]


def algorithms() -> dict[Name, Algorithm]:
    """The algorithms that --algorithm may name."""
    from posttrain import advantages as A
    from posttrain import losses as L

    clip_higher = partial(L.clipped_policy_loss, clip_high=0.28)  # as published
    return {
        "grpo": Algorithm(A.group_advantages, L.clipped_policy_loss, "sequence"),
        "dr_grpo": Algorithm(A.dr_grpo_advantages, L.clipped_policy_loss, "constant"),
        "dapo": Algorithm(A.group_advantages, clip_higher, "token"),
        "lite_ppo": Algorithm(A.batch_std_advantages, L.clipped_policy_loss, "token"),
        "dual_clip": Algorithm(A.group_advantages, L.dual_clip_policy_loss, "token"),
        "two_sided": Algorithm(A.group_advantages, L.two_sided_policy_loss, "token"),
        "gspo": Algorithm(A.group_advantages, L.gspo_loss, "sequence"),
        "gspo_token": Algorithm(A.group_advantages, L.gspo_token_loss, "sequence"),
        "cispo": Algorithm(A.group_advantages, L.cispo_loss, "token"),
        "rloo": Algorithm(A.leave_one_out_advantages, L.rloo_loss, "sequence"),
        "reinforce": Algorithm(A.leave_one_out_advantages, L.reinforce_loss, "token"),
        "reinforce_pp": Algorithm(A.reinforce_pp_advantages, L.clipped_policy_loss, "token"),
        "reinforce_pp_baseline": Algorithm(
            A.reinforce_pp_baseline_advantages, L.clipped_policy_loss, "token"
        ),
        "dppo_tv": Algorithm(A.dr_grpo_advantages, L.dppo_tv_loss, "token"),
        "dppo_kl": Algorithm(A.dr_grpo_advantages, L.dppo_kl_loss, "token"),
        "kimi": Algorithm(A.dr_grpo_advantages, L.kimi_policy_loss, "sequence"),
        "kimi_token": Algorithm(A.dr_grpo_advantages, L.kimi_token_loss, "token"),
    }


def kl_estimates() -> dict[KL, Callable[..., Any]]:
    """The estimates of the KL that --kl may name."""
    from posttrain import losses as L

    return {"k1": L.kl_k1, "k2": L.kl_k2, "k3": L.kl_k3, "k3+": L.kl_k3_plus}


def corrections() -> dict[Correction, Callable[..., Any] | None]:
    """The importance-sampling weights that --correction may name.

    auto is TIS, and only where vLLM or an earlier policy generates.
    """
    from posttrain import losses as L

    return {
        "auto": L.tis_weights,
        "none": None,
        "tis": L.tis_weights,
        "icepop": L.icepop_weights,
        "sequence_tis": L.sequence_tis_weights,
        "sequence_mask": L.sequence_mask_weights,
    }


@dataclass(kw_only=True)
class Config(RolloutConfig, GroupConfig):
    """Settings of recipes/grpo.py."""

    algorithm: Name = option("grpo", "a row of the table `algorithms`")
    clip_low: float | None = option(
        None,
        "lower clip range: the ratio is clipped at 1 - clip_low; none: the loss's own",
        above=0,
    )
    clip_high: float | None = option(
        None, "upper clip range, at 1 + clip_high; none: the algorithm's own", above=0
    )
    tau: float | None = option(
        None, "pull to the old policy, for kimi, kimi_token and dppo_tv", above=0
    )
    beta: float = option(0.0, "weight of the KL to the reference; 0: no reference", at_least=0)
    kl: KL = option("k3", "its estimate: k1 in the reward, others in the loss")
    entropy_coef: float = option(0.0, "weight of the entropy bonus", at_least=0)
    off_policy_threshold: float | None = option(
        None, "nats per token beyond which a bad, off-policy completion does not train", above=0
    )
    prm: str | None = option(None, "process reward model that rewards each step; none: rules")
    correction: Correction = option("auto", "importance-sampling correction for another sampler")
    output_dir: str = "runs/grpo"

    def check(self) -> None:
        """ConfigError for a KL, a reference or a correction that is needed and not there."""
        if self.prm and (self.kl == "k1" or self.algorithm not in ("grpo", "dapo", "dual_clip")):
            raise ConfigError(
                "prm: expected --algorithm grpo, dapo or dual_clip, whose advantage is the "
                f"group's, and a KL in the loss; found {self.algorithm} and --kl {self.kl}."
            )
        if self.kl != "k3" and not self.beta:
            raise ConfigError(f"kl: expected --beta above 0 with {self.kl}, found 0: no KL at all.")
        if self.reference_sync_steps and (self.use_peft or not self.beta):
            raise ConfigError(
                "reference_sync_steps: expected a separate reference, which exists with --beta "
                f"above 0 and without --use_peft; found {self.beta:g} and {self.use_peft}."
            )
        if self.save_steps % (self.reference_sync_steps or 1):
            raise ConfigError(
                "save_steps: expected a multiple of --reference_sync_steps "
                f"({self.reference_sync_steps}), so that a resumed run has the same reference; "
                f"found {self.save_steps}."
            )
        other = [f for f in ("top_k", "overlap_rollouts") if getattr(self, f)]
        other += ["top_p"] * (self.top_p < 1) + ["rollout vllm"] * (self.rollout == "vllm")
        if self.correction == "none" and other:
            raise ConfigError(
                f"correction: expected one with --{other[0]}, where completions come from another "
                "distribution than the policy's; found none."
            )


def process_supervision(config: Config, tokenizer, rewards: Rewards):
    """The rewards and the advantage of a run in which a process reward model judges each step."""
    from posttrain.models.process_reward import load_process_reward
    from posttrain.rollouts.steps import StepAdvantages

    judge = replace(config, model_name_or_path=config.prm)
    prm = load_process_reward(judge, tokenizer)
    logged = {name: (reward, 0.0) for name, (reward, _) in rewards.items()}
    return {"process": (prm, 1.0), **logged}, StepAdvantages(prm.steps)


def main(config: Config, rewards: Rewards | None = None):
    """Train by the algorithm that the settings name, and return the trainer.

    rewards: {name: (function, weight)}, the main one named accuracy; none: those that the settings
    name.
    """
    rewards = rewards or rule_rewards(config)
    begin(config, config.prm)

    from posttrain.losses import off_policy_mask
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.models.vision import load_processor
    from posttrain.rewards.checks import reward_facts
    from posttrain.trainers.callbacks import guards
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.objective import Objective
    from posttrain.trainers.rl import RLTrainer

    algorithm = algorithms()[config.algorithm]
    loss = bind(
        algorithm.loss, clip_low=config.clip_low, clip_high=config.clip_high, tau=config.tau
    )
    chosen = config.correction
    engine, correction = choose_engine(config, corrections()[chosen], where_needed=chosen == "auto")
    in_reward, threshold = config.kl == "k1", config.off_policy_threshold
    objective = Objective(
        loss,
        per=algorithm.per,
        beta=0 if in_reward else config.beta,
        kl=kl_estimates()[config.kl],
        entropy_coef=config.entropy_coef,
        correction=correction,
        off_policy_mask=threshold and partial(off_policy_mask, threshold=threshold),
    )
    tokenizer, advantage = load_tokenizer(config.model_name_or_path), algorithm.advantage
    callbacks, find_heads = guards(config.max_step_kl, config.reference_sync_steps), None
    if config.train_heads:
        from posttrain.trainers.heads_along import HeadsAlong

        callbacks.append(HeadsAlong(config.model_name_or_path))
        find_heads = callbacks[-1].find
    if config.prm:
        rewards, advantage = process_supervision(config, tokenizer, rewards)
    rollouts = make_rollouts(
        config,
        rewards,
        tokenizer,
        advantage=advantage,
        engine=engine,
        find_heads=find_heads,
        reward_kl_coef=config.beta if in_reward else 0,
        processor=partial(load_processor, config.model_name_or_path),
    )
    trainer = RLTrainer(
        load_model(config, images=have_images(rollouts.prompts, rollouts.eval_prompts)),
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
