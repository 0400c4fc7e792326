"""The tiny base model: a LLaMA from random weights, trained as a plain language model.

    python recipes/base.py

It stands in for a downloaded base model, so that the other recipes run with zero arguments. Reads
texts of worked problems (data/README.md describes them), writes the run folder. All tokens are
trained: L = -(1/N) sum_t log p(x_t | x_<t).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.errors import ConfigError
from posttrain.run.folder import check_run
from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import ModelConfig, RunConfig

if TYPE_CHECKING:
    from posttrain.trainers.sft import SFTTrainer


@dataclass(kw_only=True)
class Config(ModelConfig, RunConfig):
    """Settings of the tiny base model's training run."""

    dataset: str = option("data/corpus.jsonl", "file, folder or Hub name of the texts")
    max_length: int = option(256, "tokens of the longest text; longer ones are cut", at_least=2)
    hidden_size: int = option(128, "width of the model, a multiple of 32", at_least=32)
    model_name_or_path: str = option("data/tiny_tokenizer", "folder of the tokenizer")
    output_dir: str = "runs/base"
    per_device_train_batch_size: int = 32
    max_steps: int = 850
    learning_rate: float = 3e-3
    adam_beta2: float = 0.95
    warmup_steps: float = 0.05
    logging_steps: int = 50

    def check(self) -> None:
        """Raise ConfigError for a width that is not a whole number of heads."""
        if self.hidden_size % 32:
            raise ConfigError(f"hidden_size: expected a multiple of 32, found {self.hidden_size}.")


def main(config: Config) -> SFTTrainer:
    """Train a new tiny LLaMA on plain texts, and save the model to the run folder."""
    check_run(config)

    from transformers import AutoModelForCausalLM, set_seed

    from posttrain.data import load_documents
    from posttrain.losses import nll_loss
    from posttrain.models.load import load_tokenizer, make_trainable
    from posttrain.models.tiny import tiny_llama_config
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.sft import SFTTrainer

    tokenizer = load_tokenizer(config.model_name_or_path)
    documents = load_documents(
        config.dataset, tokenizer, template="plain", max_length=config.max_length
    )
    set_seed(config.seed)
    model = AutoModelForCausalLM.from_config(
        tiny_llama_config(tokenizer, hidden_size=config.hidden_size)
    )
    trainer = SFTTrainer(
        make_trainable(model, config),
        training_arguments(config),
        documents=documents,
        tokenizer=tokenizer,
        loss=nll_loss,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
