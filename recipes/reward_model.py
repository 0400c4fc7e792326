"""A reward model: one number for each answer, higher for what people prefer.

    python recipes/reward_model.py                           tiny model, shipped pairs, 2 cores
    python recipes/reward_model.py --dataset my_pairs.jsonl --model_name_or_path …
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/reward_model.py \\
        --config recipes/configs/reward_model_qwen3_0.6b.yaml

Reads pairs (prompt, chosen, rejected: strings, messages or whole dialogues), writes the run
folder: config.yaml, env.json, metrics.jsonl, model/, which loads with
`AutoModelForSequenceClassification.from_pretrained`. With r the score at an answer's last token,

    L = -(1/B) sum log sigmoid(r_chosen - r_rejected - margin) + centering (r_chosen + r_rejected)^2

InstructGPT, arXiv 2203.02155 Eq. 1; margin: Llama 2, 2307.09288 Eq. 2; centering: 2312.09244.
Left out: rankings of more than two completions (`posttrain.losses.kwise_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common import SFT_MODEL, begin

from posttrain.run.options import bind, option, parse, plain_errors
from posttrain.run.settings import ModelConfig, RunConfig

if TYPE_CHECKING:
    from posttrain.trainers.reward import RewardTrainer


@dataclass(kw_only=True)
class Config(ModelConfig, RunConfig):
    """Settings of a reward model's training run."""

    dataset: str = option("data/preferences.jsonl", "file, folder or Hub name of the pairs")
    eval_dataset: str | None = option(None, "held-out pairs for eval_steps; none: no evaluation")
    template: str = option("auto", "prompt format: auto, alpaca, chat, plain")
    max_length: int = option(
        1024, "tokens of the longest prompt with answer; longer ones are dropped", at_least=2
    )
    margin: float | None = option(
        None,
        "how far apart a pair's rewards should be; none: 0, or the data's column margin",
        at_least=0,
    )
    centering: float = option(
        0.01, "weight of the pull of a pair's rewards to a sum of 0", at_least=0
    )
    model_name_or_path: str = SFT_MODEL
    output_dir: str = "runs/reward_model"
    max_steps: int = 40
    per_device_train_batch_size: int = 32
    learning_rate: float = 3e-4


def main(config: Config) -> RewardTrainer:
    """Train a reward model on preference pairs, and save it to the run folder."""
    begin(config)

    from posttrain.data import load_pairs
    from posttrain.losses import bradley_terry_loss
    from posttrain.models.load import load_tokenizer
    from posttrain.models.reward_model import load_reward_model
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.reward import RewardTrainer, check_pairs

    tokenizer = load_tokenizer(config.model_name_or_path)
    settings = {"template": config.template, "max_length": config.max_length}
    pairs, eval_pairs = load_pairs(config.dataset, tokenizer, **settings), None
    if config.eval_dataset:
        eval_pairs = load_pairs(config.eval_dataset, tokenizer, split="test", **settings)
    loss = bind(bradley_terry_loss, centering=config.centering, margin=config.margin)
    check_pairs(pairs, eval_pairs, loss)  # before the model is loaded
    trainer = RewardTrainer(
        load_reward_model(config, tokenizer),
        training_arguments(config),
        pairs=pairs,
        eval_pairs=eval_pairs,
        tokenizer=tokenizer,
        loss=loss,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    if eval_pairs:
        from posttrain.trainers.held_out_samples import HeldOutScores

        trainer.add_callback(HeldOutScores(trainer, config.output_dir))
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
