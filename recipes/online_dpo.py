"""Online DPO: the policy samples pairs, a judge of any kind prefers one, and DPO's loss learns it.

    python recipes/online_dpo.py                             tiny model, shipped problems, rules
    python recipes/online_dpo.py --reward_model runs/reward_model/model
    python recipes/online_dpo.py --reward my_judge.yaml --dataset my.jsonl

Reads problems (question, and answer or tests), with a reward model or a judge any prompts; writes
the run folder as recipes/r1_zero.py does. Of G completions of a prompt, sampled by the policy of
the step, the best is chosen and the worst rejected; a tie is dropped, and counted. With h = log pi
- log pi_ref of a completion, over the N pairs of the optimizer batch,

    L = -(1/N) sum log sigmoid(beta (h_chosen - h_rejected))          DPO; others by --loss

OAIF, arXiv 2402.04792. The reference is the model that training starts from, or with LoRA the model
without its adapter. Left out: a reference that moves (r1's iterations), mixing in given pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from common import SFT_MODEL, RolloutConfig, begin, choose_engine, make_rollouts, rule_rewards

from posttrain.errors import ConfigError
from posttrain.run.options import bind, option, parse, plain_errors
from posttrain.run.settings import RLConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.trainers.online_dpo import OnlineDPOTrainer

LossName = Literal["dpo", "ipo", "hinge"]


def losses() -> dict[LossName, Callable[..., Any]]:
    """The losses that --loss may name, as in OAIF: DPO, IPO, SLiC's."""
    from posttrain import losses as L

    return {"dpo": L.dpo_loss, "ipo": L.ipo_loss, "hinge": L.hinge_loss}


@dataclass(kw_only=True)
class Config(RolloutConfig, RLConfig):
    """Settings of recipes/online_dpo.py."""

    loss: LossName = option("dpo", "loss of a pair")
    beta: float | None = option(
        None, "weight of the KL to the reference; none: the loss's own", above=0
    )
    reward_model: str | None = option(
        None, "folder or Hub name of a reward model, whose score replaces all rewards"
    )
    missing_eos_penalty: float = option(
        1.0, "subtracted from the reward model's score of a truncated completion", at_least=0
    )
    updates_per_rollout: int = option(1, "optimizer steps for each rollout", at_least=1)
    model_name_or_path: str = SFT_MODEL
    template: str = "alpaca"
    num_generations: int = 2
    output_dir: str = "runs/online_dpo"

    def check(self) -> None:
        """Raise ConfigError for two scorers."""
        if self.reward_model and self.reward != "math":
            raise ConfigError(
                f"reward_model: expected one scorer, found --reward {self.reward} too."
            )


def rewards_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The reward model's score and a penalty for a missing end."""
    from posttrain.data.encode import stop_ids_of
    from posttrain.models.reward_model import load_reward
    from posttrain.rewards.length import missing_eos

    score = load_reward(replace(config, model_name_or_path=config.reward_model), tokenizer)
    stop_ids = stop_ids_of(config.model_name_or_path, tokenizer)
    ended = partial(missing_eos, stop_ids=stop_ids)
    return {"score": (score, 1.0), "missing_eos": (ended, config.missing_eos_penalty)}


def main(config: Config) -> OnlineDPOTrainer:
    """Train on the policy's own pairs as the settings say, and return the trainer."""
    rewards = {} if config.reward_model else rule_rewards(config)
    begin(config, config.reward_model)

    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.rewards.checks import reward_facts
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.online_dpo import OnlineDPOTrainer, PairObjective, PairRollouts

    engine, _ = choose_engine(config, None)
    tokenizer = load_tokenizer(config.model_name_or_path)
    rewards = rewards or rewards_of(config, tokenizer)
    rollouts = make_rollouts(
        config, rewards, tokenizer, advantage=None, engine=engine, source=PairRollouts
    )
    trainer = OnlineDPOTrainer(
        load_model(config),
        training_arguments(config),
        rollouts,
        PairObjective(bind(losses()[config.loss], beta=config.beta)),
        tokenizer=tokenizer,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    fit(trainer, config, facts=reward_facts(rewards))
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
