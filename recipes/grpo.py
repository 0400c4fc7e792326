"""GRPO and its relatives: RL from rewards, with the algorithm chosen by name.

    python recipes/grpo.py                                   GRPO, tiny model, shipped problems
    python recipes/grpo.py --algorithm dapo --max_refills 3 --drop_truncated
    python recipes/grpo.py --algorithm gspo --updates_per_rollout 4

Reads problems (question, and answer or tests), writes the run folder as recipes/r1_zero.py does.
An algorithm is an advantage of the G answers to a prompt, a loss per token, and what the loss is a
mean over: the table below. The formulas stand with the functions, in posttrain/advantages.py and
posttrain/losses/; docs/rl.md says which to choose when.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from posttrain.config import option, parse, plain_errors
from posttrain.rl_settings import RLConfig, rl_inputs, rule_rewards
from posttrain.rollout_settings import RolloutConfig, rollout_inputs
from posttrain.stages import make_missing

# Advantage (posttrain.advantages), loss (posttrain.losses), and what the loss is a mean over.
ALGORITHMS = {
    "grpo": ("group_advantages", "clipped_policy_loss", "sequence"),
    "dr_grpo": ("dr_grpo_advantages", "clipped_policy_loss", "constant"),
    "dapo": ("group_advantages", "clipped_policy_loss", "token"),
    "lite_ppo": ("batch_std_advantages", "clipped_policy_loss", "token"),
    "gspo": ("group_advantages", "gspo_loss", "sequence"),
    "cispo": ("group_advantages", "cispo_loss", "token"),
    "rloo": ("leave_one_out_advantages", "rloo_loss", "sequence"),
    "reinforce": ("leave_one_out_advantages", "reinforce_loss", "token"),
    "dppo_tv": ("dr_grpo_advantages", "dppo_tv_loss", "token"),
    "dppo_kl": ("dr_grpo_advantages", "dppo_kl_loss", "token"),
    "kimi": ("dr_grpo_advantages", "kimi_policy_loss", "sequence"),
}
# Published ranges where they are not the loss's own defaults.
SETTINGS = {"dapo": {"clip_high": 0.28}}
# Names of …_weights in posttrain.losses; auto: tis where vLLM or an earlier policy draws.
CORRECTIONS = ("auto", "none", "tis", "icepop", "sequence_tis", "sequence_mask")


@dataclass(kw_only=True)
class Config(RolloutConfig, RLConfig):
    algorithm: Literal[tuple(ALGORITHMS)] = option("grpo", "a row of the table ALGORITHMS")
    clip_low: float | None = option(None, "the ratio may fall so far; none: as published", above=0)
    clip_high: float | None = option(None, "the ratio may rise so far; none: as published", above=0)
    tau: float | None = option(None, "pull to the old policy, for kimi and dppo_tv", above=0)
    beta: float = option(0.0, "weight of the KL to the reference; 0: no reference", at_least=0)
    reference_sync_steps: int = option(0, "steps after which the reference moves; 0: never")
    max_step_kl: float | None = option(None, "nats a token may move in one step", above=0)
    updates_per_rollout: int = option(1, "optimizer steps for each rollout", at_least=1)
    max_refills: int = option(0, "rounds that replace groups without spread", at_least=0)
    drop_truncated: bool = option(False, "answers that were cut do not train")
    top_p: float = option(1.0, "draw from the most likely tokens of this share", above=0, at_most=1)
    top_k: int = option(0, "draw from so many most likely tokens; 0: all", at_least=0)
    correction: Literal[CORRECTIONS] = option("auto", "weights where sampling is not training's")
    output_dir: str = "runs/grpo"


def main(config: Config):
    rewards = rule_rewards(config)
    make_missing(config.model_name_or_path)

    from posttrain import advantages, losses
    from posttrain.models.loading import load_model
    from posttrain.rewards.checks import reward_facts
    from posttrain.rollouts.loader import Selection
    from posttrain.runs import open_run
    from posttrain.trainers.binding import bind
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.rl import RLTrainer
    from posttrain.trainers.trust import guards

    advantage, loss, per = ALGORITHMS[config.algorithm]
    loss = partial(getattr(losses, loss), **SETTINGS.get(config.algorithm, {}))
    loss = bind(loss, clip_low=config.clip_low, clip_high=config.clip_high, tau=config.tau)
    inputs = rl_inputs(config, rewards) | rollout_inputs(config, config.correction)
    inputs["sampling"] = replace(inputs["sampling"], top_p=config.top_p, top_k=config.top_k)
    facts = reward_facts(rewards)
    open_run(config.output_dir, config, resume=config.resume, facts=facts)
    trainer = RLTrainer(
        load_model(config),
        training_arguments(config),
        **inputs,
        advantage=getattr(advantages, advantage),
        loss=loss,
        per=per,
        beta=config.beta,
        updates_per_rollout=config.updates_per_rollout,
        selection=Selection(config.max_refills, "accuracy", config.drop_truncated),
        callbacks=guards(config.max_step_kl, config.reference_sync_steps),
    )
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
