"""Direct preference optimisation: make the chosen answer likelier than the rejected one.

    python recipes/dpo.py                                    tiny model, shipped pairs, 2 cores
    python recipes/dpo.py --loss ipo --beta 0.05 --dataset my_pairs.jsonl --model_name_or_path …
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/dpo.py \\
        --config recipes/configs/dpo_llama_3.2_1b.yaml

Reads pairs (prompt, chosen, rejected: strings, messages or whole dialogues), writes the run
folder: config.yaml, env.json, metrics.jsonl, model/. With h = log pi(y|x) - log pi_ref(y|x),

    L = -(1/B) sum log sigmoid(beta (h_chosen - h_rejected))       DPO, arXiv 2305.18290 Eq. 7

The reference is the model that training starts from; its log-probs are computed once, before the
first step. Left out: a reference that moves. Losses on single completions: recipes/kto.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from common import SFT_MODEL, begin

from posttrain.run.options import bind, option, parse, plain_errors
from posttrain.run.settings import ModelConfig, RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.trainers.preference import PreferenceTrainer

LossName = Literal[
    "dpo",
    "dpo_length_norm",
    "ipo",
    "ipo_avg",
    "cdpo",
    "robust",
    "hinge",
    "exo",
    "nca",
    "bco",
    "sppo",
    "apo_zero",
    "apo_down",
    "discopop",
    "simpo",
    "cpo",
    "orpo",
]


def losses() -> dict[LossName, Callable[..., Tensor]]:
    """Map each --loss to its function, which has the formula, its source and its defaults."""
    from posttrain import losses as L

    return {
        "dpo": L.dpo_loss,
        "dpo_length_norm": L.dpo_length_norm_loss,
        "ipo": L.ipo_loss,
        "ipo_avg": L.ipo_avg_loss,
        "cdpo": L.cdpo_loss,
        "robust": L.robust_dpo_loss,
        "hinge": L.hinge_loss,
        "exo": L.exo_loss,
        "nca": L.nca_loss,
        "bco": L.bco_pair_loss,
        "sppo": L.sppo_loss,
        "apo_zero": L.apo_zero_loss,
        "apo_down": L.apo_down_loss,
        "discopop": L.discopop_loss,
        "simpo": L.simpo_loss,
        "cpo": L.cpo_loss,
        "orpo": L.orpo_loss,
    }


@dataclass(kw_only=True)
class Config(ModelConfig, RunConfig):
    """Settings of a DPO run."""

    dataset: str = option("data/preferences.jsonl", "file, folder or Hub name of the pairs")
    eval_dataset: str | None = option(None, "held-out pairs for eval_steps; none: no evaluation")
    template: str = option("auto", "prompt format: auto, alpaca, chat, plain")
    max_length: int = option(
        1024, "tokens of the longest prompt with answer; longer ones are dropped", at_least=2
    )
    loss: LossName = option("dpo", "preference loss")
    beta: float | None = option(
        None,
        "weight of the KL term or scale of the reward; none: the loss's published value",
        above=0,
    )
    label_smoothing: float | None = option(
        None, "assumed share of wrong labels, for cdpo, robust and exo", at_least=0
    )
    model_name_or_path: str = SFT_MODEL
    output_dir: str = "runs/dpo"
    max_steps: int = 40
    per_device_train_batch_size: int = 32
    learning_rate: float = 3e-5


def main(config: Config) -> PreferenceTrainer:
    """Train on preference pairs, and save the model to the run folder."""
    begin(config)

    from posttrain.data import load_pairs
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.models.vision import load_processor
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.preference import PreferenceTrainer

    loss = bind(losses()[config.loss], beta=config.beta, label_smoothing=config.label_smoothing)
    tokenizer = load_tokenizer(config.model_name_or_path)
    settings = {
        "template": config.template,
        "max_length": config.max_length,
        "processor": partial(load_processor, config.model_name_or_path),
    }
    pairs, eval_pairs = load_pairs(config.dataset, tokenizer, **settings), None
    if config.eval_dataset:
        eval_pairs = load_pairs(config.eval_dataset, tokenizer, split="test", **settings)
    trainer = PreferenceTrainer(
        load_model(config, images="images" in pairs.column_names),
        training_arguments(config),
        pairs=pairs,
        eval_pairs=eval_pairs,
        tokenizer=tokenizer,
        loss=loss,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    if eval_pairs:
        from posttrain.trainers.held_out_samples import HeldOutSamples

        trainer.add_callback(HeldOutSamples(trainer, config.output_dir))
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
