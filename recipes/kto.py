"""KTO and relatives: make good completions likelier and bad ones less likely, without pairs.

    python recipes/kto.py                                    tiny model, shipped pairs, 2 cores
    python recipes/kto.py --loss bco --dataset my_thumbs.jsonl --model_name_or_path …
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/kto.py --config my.yaml

Reads completions with a label (prompt, completion, label), or pairs, of which each gives a good and
a bad completion; writes the run folder: config.yaml, env.json, metrics.jsonl, model/. With
h = log pi(y|x) - log pi_ref(y|x) and z0 an estimate of the KL to the reference,

    L = (1/B) ( sum over good ones of w_good sigmoid(beta (z0 - h))            KTO, 2402.01306 Eq. 8
              + sum over bad ones of w_bad sigmoid(beta (h - z0)) )

The reference is the model that training starts from; its log-probs are computed once, before the
first step. Left out: APO-down, whose loss needs the difference of a pair (recipes/dpo.py has it),
and BCO's density ratio of prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from common import SFT_MODEL, begin

from posttrain.errors import ConfigError
from posttrain.run.options import bind, option, parse, plain_errors, say
from posttrain.run.settings import ModelConfig, RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.trainers.unpaired import UnpairedTrainer

LossName = Literal["kto", "bco", "apo_zero"]


def losses() -> dict[LossName, Callable[..., Tensor]]:
    """Map each --loss to its function, which has the formula, its source and its defaults."""
    from posttrain import losses as L

    return {
        "kto": L.kto_loss,
        "bco": L.bco_unpaired_loss,
        "apo_zero": L.apo_zero_unpaired_loss,
    }


@dataclass(kw_only=True)
class Config(ModelConfig, RunConfig):
    """Settings of a run on single, labelled completions."""

    dataset: str = option(
        "data/preferences.jsonl", "file, folder or Hub name of labelled completions or pairs"
    )
    eval_dataset: str | None = option(None, "held-out data for eval_steps; none: no evaluation")
    template: str = option("auto", "prompt format: auto, alpaca, chat, plain")
    max_length: int = option(
        1024, "tokens of the longest prompt with completion; longer ones are dropped", at_least=2
    )
    loss: LossName = option("kto", "loss of a completion")
    beta: float | None = option(
        None, "weight of the KL term or scale of the reward; none: the loss's own, 0.1", above=0
    )
    desirable_weight: float | None = option(
        None, "weight of good completions, for kto and apo_zero; none: 1", above=0
    )
    undesirable_weight: float | None = option(
        None, "weight of bad completions, for kto and apo_zero; none: 1", above=0
    )
    model_name_or_path: str = SFT_MODEL
    output_dir: str = "runs/kto"
    max_steps: int = 40
    per_device_train_batch_size: int = 64
    learning_rate: float = 3e-4

    def check(self) -> None:
        """Raise ConfigError for weights that the loss does not have."""
        for name in ("desirable_weight", "undesirable_weight"):
            if self.loss == "bco" and getattr(self, name) is not None:
                raise ConfigError(f"{name}: expected --loss kto or apo_zero with it, found bco.")


def main(config: Config) -> UnpairedTrainer:
    """Train on labelled completions, and save the model to the run folder."""
    begin(config)

    from posttrain.data import load_unpaired
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.unpaired import UnpairedTrainer, check_completions, weights_advice

    weights = (config.desirable_weight or 1.0, config.undesirable_weight or 1.0)
    loss = bind(
        losses()[config.loss],
        beta=config.beta,
        weights=None if config.loss == "bco" else weights,
    )
    tokenizer = load_tokenizer(config.model_name_or_path)
    settings = {"template": config.template, "max_length": config.max_length}
    completions, held_out = load_unpaired(config.dataset, tokenizer, **settings), None
    if config.eval_dataset:
        held_out = load_unpaired(config.eval_dataset, tokenizer, split="test", **settings)
    check_completions(completions, loss)  # before the model is loaded
    if config.loss == "kto" and (advice := weights_advice(completions["label"], weights)):
        say(advice)
    trainer = UnpairedTrainer(
        load_model(config),
        training_arguments(config),
        completions=completions,
        eval_completions=held_out,
        tokenizer=tokenizer,
        loss=loss,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
