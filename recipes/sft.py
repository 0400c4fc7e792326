"""Supervised fine-tuning, Alpaca-style: learn to answer instructions.

    python recipes/sft.py                                    tiny model, shipped data, 2 cores
    python recipes/sft.py --config recipes/configs/sft_llama_3.2_1b.yaml --dataset my.jsonl
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/sft.py \\
        --config recipes/configs/sft_llama_3.2_1b.yaml

Reads instructions (Alpaca, messages, ShareGPT, prompt/completion, question/answer …), writes the
run folder: config.yaml, env.json, metrics.jsonl, model/. The loss is the mean negative log-prob of
the answer's tokens and its end-of-sequence token,

    L = -(1/N) sum_t log p(y_t | prompt, y_<t),    N trained tokens in the whole optimizer batch.

Alpaca: github.com/tatsu-lab/stanford_alpaca. Left out: packing options (packing is always on, and
exact); a flag for the loss (pass another one of posttrain.losses.supervised below).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from common import BASE_MODEL, begin

from posttrain.data.encode import Truncation
from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import ModelConfig, RunConfig

if TYPE_CHECKING:
    from posttrain.trainers.sft import SFTTrainer


@dataclass(kw_only=True)
class Config(ModelConfig, RunConfig):
    """Settings of a supervised fine-tuning run."""

    dataset: str = option("data/sft.jsonl", "file, folder or Hub name of the instructions")
    eval_dataset: str | None = option(
        None, "held-out instructions for eval_steps; none: no evaluation"
    )
    template: str = option("auto", "prompt format: auto, alpaca, chat, plain")
    max_length: int = option(512, "tokens of the longest document", at_least=2)
    truncation: Truncation = option(
        "keep_start",
        "what to do with longer documents: keep_start (loses the end token), keep_end or drop",
    )
    model_name_or_path: str = BASE_MODEL
    output_dir: str = "runs/sft"
    max_steps: int = 120
    per_device_train_batch_size: int = 32
    learning_rate: float = 1e-3


def main(config: Config) -> SFTTrainer:
    """Train on instructions with answers, and save the model to the run folder."""
    begin(config)

    from posttrain.data import load_documents
    from posttrain.losses import nll_loss
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.models.vision import load_processor
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.sft import SFTTrainer

    tokenizer = load_tokenizer(config.model_name_or_path)
    settings = {
        "template": config.template,
        "max_length": config.max_length,
        "truncation": config.truncation,
        "processor": partial(load_processor, config.model_name_or_path),
    }
    documents, eval_documents = load_documents(config.dataset, tokenizer, **settings), None
    if config.eval_dataset:
        eval_documents = load_documents(config.eval_dataset, tokenizer, split="test", **settings)
    columns = {name for data in (documents, eval_documents) if data for name in data.column_names}
    trainer = SFTTrainer(
        load_model(config, images="images" in columns),
        training_arguments(config),
        documents=documents,
        eval_documents=eval_documents,
        tokenizer=tokenizer,
        loss=nll_loss,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    if eval_documents:
        from posttrain.trainers.held_out_samples import HeldOutSamples

        trainer.add_callback(HeldOutSamples(trainer, config.output_dir))
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
