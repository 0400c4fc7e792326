"""GRPO and its relatives: RL from rewards, with the algorithm chosen by name.

    python recipes/grpo.py                                   GRPO, tiny model, shipped problems
    python recipes/grpo.py --algorithm dapo --max_refills 3 --drop_truncated
    python recipes/grpo.py --algorithm gspo --updates_per_rollout 4

Reads problems (question, and answer or tests), writes the run folder as recipes/r1_zero.py does.
An algorithm is an advantage of the G answers to a prompt, a loss per token, and what the loss is a
mean over: the table below. The formulas stand with the functions, in posttrain/advantages.py and
posttrain/losses/; docs/rl.md says which to choose when.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from rl_setup import group_inputs, rollout_inputs, rule_rewards
from tiny_world import make_missing

from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import GroupConfig, RolloutConfig

# Advantage (posttrain.advantages), loss (posttrain.losses), and what the loss is a mean over.
ALGORITHMS = {
    "grpo": ("group_advantages", "clipped_policy_loss", "sequence"),
    "dr_grpo": ("dr_grpo_advantages", "clipped_policy_loss", "constant"),
    "dapo": ("group_advantages", "clipped_policy_loss", "token"),
    "lite_ppo": ("batch_std_advantages", "clipped_policy_loss", "token"),
    "dual_clip": ("group_advantages", "dual_clip_policy_loss", "token"),
    "two_sided": ("group_advantages", "two_sided_policy_loss", "token"),
    "gspo": ("group_advantages", "gspo_loss", "sequence"),
    "gspo_token": ("group_advantages", "gspo_token_loss", "sequence"),
    "cispo": ("group_advantages", "cispo_loss", "token"),
    "rloo": ("leave_one_out_advantages", "rloo_loss", "sequence"),
    "reinforce": ("leave_one_out_advantages", "reinforce_loss", "token"),
    "reinforce_pp": ("reinforce_pp_advantages", "clipped_policy_loss", "token"),
    "reinforce_pp_baseline": ("reinforce_pp_baseline_advantages", "clipped_policy_loss", "token"),
    "dppo_tv": ("dr_grpo_advantages", "dppo_tv_loss", "token"),
    "dppo_kl": ("dr_grpo_advantages", "dppo_kl_loss", "token"),
    "kimi": ("dr_grpo_advantages", "kimi_policy_loss", "sequence"),
    "kimi_token": ("dr_grpo_advantages", "kimi_token_loss", "token"),
}
# Published ranges where they are not the loss's own defaults.
SETTINGS = {"dapo": {"clip_high": 0.28}}
KL = {"k1": "kl_k1", "k2": "kl_k2", "k3": "kl_k3", "k3+": "kl_k3_plus"}
# In posttrain.losses; auto: only where vLLM or an earlier policy draws.
CORRECTIONS = {
    "auto": "tis_weights", "none": None, "tis": "tis_weights", "icepop": "icepop_weights",
    "sequence_tis": "sequence_tis_weights", "sequence_mask": "sequence_mask_weights",
}  # fmt: skip


@dataclass(kw_only=True)
class Config(RolloutConfig, GroupConfig):
    algorithm: Literal[tuple(ALGORITHMS)] = option("grpo", "a row of the table ALGORITHMS")
    clip_low: float | None = option(None, "the ratio may fall so far; none: as published", above=0)
    clip_high: float | None = option(None, "the ratio may rise so far; none: as published", above=0)
    tau: float | None = option(None, "pull to the old policy, for kimi… and dppo_tv", above=0)
    beta: float = option(0.0, "weight of the KL to the reference; 0: no reference", at_least=0)
    kl: Literal[tuple(KL)] = option("k3", "its estimate: k1 in the reward, others in the loss")
    entropy_coef: float = option(0.0, "weight of the entropy bonus", at_least=0)
    off_policy_threshold: float | None = option(None, "nats a bad answer may lose", above=0)
    correction: Literal[tuple(CORRECTIONS)] = option("auto", "weights for another sampler")
    output_dir: str = "runs/grpo"

    def check(self) -> None:
        if self.kl != "k3" and not self.beta:
            raise ConfigError(f"kl: expected --beta above 0 with {self.kl}, found 0: no KL at all.")


def main(config: Config):
    rewards = rule_rewards(config)
    make_missing(config.model_name_or_path)

    from posttrain import advantages, losses
    from posttrain.models.load import load_model
    from posttrain.rewards.checks import reward_facts
    from posttrain.run.folder import open_run
    from posttrain.run.options import bind
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.rl import RLTrainer

    advantage, loss, per = ALGORITHMS[config.algorithm]
    loss = partial(getattr(losses, loss), **SETTINGS.get(config.algorithm, {}))
    loss = bind(loss, clip_low=config.clip_low, clip_high=config.clip_high, tau=config.tau)
    threshold = config.off_policy_threshold
    weights = CORRECTIONS[config.correction]
    weights = weights and getattr(losses, weights)
    inputs = group_inputs(config, rewards)
    inputs |= rollout_inputs(config, weights, where_needed=config.correction == "auto")
    open_run(config.output_dir, config, resume=config.resume, facts=reward_facts(rewards))
    trainer = RLTrainer(
        load_model(config),
        training_arguments(config),
        **inputs,
        advantage=getattr(advantages, advantage),
        loss=loss,
        off_policy_mask=threshold and partial(losses.off_policy_mask, threshold=threshold),
        per=per,
        beta=0 if config.kl == "k1" else config.beta,
        kl=getattr(losses, KL[config.kl]),
        reward_kl_coef=config.beta if config.kl == "k1" else 0,
        entropy_coef=config.entropy_coef,
    )
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
