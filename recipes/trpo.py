"""TRPO: RL from rewards by natural gradient steps within a hard bound on the KL.

    python recipes/trpo.py                                   tiny model, shipped problems, 2 cores
    python recipes/trpo.py --use_peft --max_kl 0.01          LoRA: the step moves the adapter alone

Reads problems (question, and answer or tests), writes the run folder as recipes/r1_zero.py does.
Each step maximises over the trained weights

    L = mean of (pi / pi_old) A   subject to   D = mean KL(pi_old || pi) <= max_kl

with means over the tokens of the rollout, the KL over the whole vocabulary, and A the advantage of
a completion over the others of its prompt. A quadratic model of D gives the step: x solves
(F + damping I) x = grad L by conjugate gradients, F being the Fisher matrix, and
sqrt(2 max_kl / x (F + damping I) x) x is tried first, then shortened until D keeps the bound and L
does not fall. TRPO, arXiv 1502.05477; formulas: posttrain/trainers/natural_gradient.py. Left out: a
critic, half precision.
"""

from dataclasses import dataclass, fields
from typing import Literal

from common import begin, make_rollouts, rule_rewards

from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import RLConfig

# Inherited settings that have no effect on a step whose length the bound decides.
OF_OTHER_OPTIMIZERS = [
    *("learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "adam_beta2", "max_grad_norm"),
]
UNDER_TRAINER = [  # likewise, of transformers.TrainingArguments
    *("optim", "optim_args", "adam_beta1", "adam_epsilon", "lr_scheduler_kwargs"),
]


@dataclass(kw_only=True)
class Config(RLConfig):
    """Settings of recipes/trpo.py."""

    max_kl: float = option(0.003, "largest KL of one step, in nats per token", above=0)
    damping: float = option(
        0.01,
        "added to the diagonal of the Fisher matrix; large values give plain gradients",
        at_least=0,
    )
    cg_iterations: int = option(10, "iterations of conjugate gradients in a step", at_least=1)
    fisher_share: float = option(
        1.0, "share of micro-batches that the Fisher matrix is computed on", above=0, at_most=1
    )
    max_backtracks: int = option(
        10, "lengths of a step that are tried before it is given up", at_least=1
    )
    shrink: float = option(0.8, "factor from one tried length to the next", above=0, at_most=0.99)
    dtype: Literal["float32"] = "float32"
    per_device_train_batch_size: int = 64
    max_steps: int = 16
    output_dir: str = "runs/trpo"

    def check(self) -> None:
        """Raise ConfigError for settings that other optimizers have and TRPO has not."""
        own = {field.name: field.default for field in fields(self)}
        found = [name for name in OF_OTHER_OPTIMIZERS if getattr(self, name) != own[name]]
        found += [f"trainer.{name}" for name in UNDER_TRAINER if name in self.trainer]
        if found:
            raise ConfigError(
                f"{found[0]}: expected no value, found one. TRPO does not use this setting; "
                "--max_kl bounds its steps."
            )


def main(config: Config):
    """Train by TRPO as the settings say, and return the trainer."""
    rewards = rule_rewards(config)
    begin(config)

    from posttrain.advantages import leave_one_out_advantages
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.rewards.checks import reward_facts
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.trpo import TRPOTrainer, TrustRegion

    tokenizer = load_tokenizer(config.model_name_or_path)
    rollouts = make_rollouts(config, rewards, tokenizer, advantage=leave_one_out_advantages)
    region = TrustRegion(
        max_kl=config.max_kl,
        damping=config.damping,
        cg_iterations=config.cg_iterations,
        fisher_share=config.fisher_share,
        max_backtracks=config.max_backtracks,
        shrink=config.shrink,
    )
    trainer = TRPOTrainer(
        load_model(config),
        training_arguments(config),
        rollouts,
        region,
        tokenizer=tokenizer,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    fit(trainer, config, facts=reward_facts(rewards))
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
