"""The settings and the documents that recipes/medusa.py and recipes/mtp.py share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from common import SFT_MODEL

from posttrain.data.encode import Truncation
from posttrain.run.options import option
from posttrain.run.settings import ModelConfig, RunConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class HeadsConfig(ModelConfig, RunConfig):
    """Settings of a run that trains heads on instructions."""

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
    model_name_or_path: str = SFT_MODEL
    max_steps: int = 60
    per_device_train_batch_size: int = 32


def documents_of(
    config: HeadsConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    """Load the documents to train on, and the held-out ones if there are any."""
    from posttrain.data import load_documents

    load = partial(
        load_documents,
        template=config.template,
        max_length=config.max_length,
        truncation=config.truncation,
    )
    documents = load(config.dataset, tokenizer)
    if not config.eval_dataset:
        return documents, None
    return documents, load(config.eval_dataset, tokenizer, split="test")
