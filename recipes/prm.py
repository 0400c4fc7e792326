"""A process reward model: the probability that each step of a solution is right.

    python recipes/prm.py                                    tiny model, shipped steps, 2 cores
    python recipes/prm.py --dataset my_steps.jsonl --step_separator "\\n\\n" --model_name_or_path …
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/prm.py --config my.yaml

Reads solutions in steps (prompt, completions: the steps, labels: right or wrong, one a step),
writes the run folder: config.yaml, env.json, metrics.jsonl, model/, which loads with
`AutoModelForTokenClassification.from_pretrained`. With s the score at a step's last token,

    L = -(1/S) sum log sigmoid(s) over right steps + log sigmoid(-s) over wrong ones

Lightman et al., arXiv 2305.20050; Math-Shepherd, 2312.08935. The model then chooses completions
(`--prm` of rejection_sampling.py and `posttrain evaluate`) or rewards each step in RL (`--prm` of
grpo.py). Left out: labels from rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common import SFT_MODEL, begin

from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import ModelConfig, RunConfig

if TYPE_CHECKING:
    from posttrain.trainers.process_reward import ProcessRewardTrainer

SHIPPED, SPACE = "data/steps.jsonl", " "


@dataclass(kw_only=True)
class Config(ModelConfig, RunConfig):
    """Settings of a process reward model's training run."""

    dataset: str = option(SHIPPED, "file, folder or Hub name of solutions in steps")
    eval_dataset: str | None = option(None, "held-out steps for eval_steps; none: no evaluation")
    template: str = option("auto", "prompt format: auto, alpaca, chat, plain")
    max_length: int = option(
        1024, "tokens of the longest prompt with solution; longer ones are dropped", at_least=2
    )
    step_separator: str | None = option(
        None, "text between two steps; none: a line break, in the shipped data a space"
    )
    model_name_or_path: str = SFT_MODEL
    output_dir: str = "runs/prm"
    max_steps: int = 40
    per_device_train_batch_size: int = 32
    learning_rate: float = 1e-3


def main(config: Config) -> ProcessRewardTrainer:
    """Train a process reward model on labelled steps, and save it to the run folder."""
    begin(config)

    from posttrain.data import load_steps
    from posttrain.models.load import load_tokenizer
    from posttrain.models.reward_model import PER_STEP, load_reward_model
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.process_reward import ProcessRewardTrainer, check_solutions

    usual = SPACE if config.dataset == SHIPPED else "\n"
    separator = usual if config.step_separator is None else config.step_separator
    tokenizer = load_tokenizer(config.model_name_or_path)
    settings = {
        "template": config.template,
        "max_length": config.max_length,
        "separator": separator,
    }
    solutions, held_out = load_steps(config.dataset, tokenizer, **settings), None
    if config.eval_dataset:
        held_out = load_steps(config.eval_dataset, tokenizer, split="test", **settings)
    check_solutions(solutions, held_out)  # before the model is loaded
    trainer = ProcessRewardTrainer(
        load_reward_model(config, tokenizer, kind=PER_STEP),
        training_arguments(config),
        solutions=solutions,
        eval_solutions=held_out,
        tokenizer=tokenizer,
        separator=separator,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
