"""A model's own completions of the prompts of documents, as documents to train on.

    documents = own_completions(documents, generator, sampling, num_generations=1, seed=0)

A prompt is what precedes the first trained token. Ids are kept as they were sampled, never decoded
and tokenised again. Medusa (2401.10774) section 2.3.2: heads learn what the model says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers import TrainerCallback

from posttrain.errors import DataError
from posttrain.rollouts.options import SEED_STRIDE
from posttrain.rollouts.sampling import Generator, Sampling
from posttrain.run.engine import from_all_ranks, rank_and_world
from posttrain.run.folder import write_whole
from posttrain.run.options import is_main_process, say

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

FILE = "completions.jsonl"


def own_completions(
    documents: Dataset,
    generator: Generator,
    sampling: Sampling,
    *,
    num_generations: int = 1,
    seed: int = 0,
) -> Dataset:
    """Sample completions of the documents' prompts; ranks share the prompts out.

    Raises DataError for a document without a prompt.
    """
    prompts = []
    for row, document in enumerate(documents.select_columns(["input_ids", "trained"])):
        start = document["trained"].index(True) if any(document["trained"]) else 0
        if start < 2 and document["trained"][start]:
            raise DataError(
                f"document {row}: expected a prompt before its first trained token, for the model "
                "to complete; found none. Plain texts have none: take instructions or problems."
            )
        prompts.append(document["input_ids"][:start])
    rank, world = rank_and_world()
    mine = range(rank, len(prompts), world)
    sampled = generator.generate(
        [prompts[i] for i in mine],
        sampling,
        num_generations,
        seeds=[seed * SEED_STRIDE + i for i in mine],
    )
    parts = from_all_ranks(dict(zip(mine, sampled, strict=True)))
    found = {i: group for part in parts for i, group in part.items()}
    rows = [
        {"input_ids": [*prompt, *completion.token_ids], "prompt_tokens": len(prompt)}
        for i, prompt in enumerate(prompts)
        for completion in found[i]
    ]
    tokens = sum(len(row["input_ids"]) - row["prompt_tokens"] for row in rows)
    say(f"data    {len(rows):,} completions of the model's own, {tokens:,} tokens")
    return as_documents(rows)


def as_documents(rows: list[dict]) -> Dataset:
    """Make documents of rows of `completions.jsonl`, all tokens after the prompt trained."""
    for row in rows:
        length = len(row["input_ids"]) - row["prompt_tokens"]
        row["trained"] = [False] * row["prompt_tokens"] + [True] * length
    return Dataset.from_list(rows)


class KeepCompletions(TrainerCallback):
    """Writes the documents into the run folder when training begins, for a resumed run to read."""

    def __init__(self, folder: str | Path, documents: Dataset) -> None:
        self.path, self.documents = Path(folder) / FILE, documents

    def on_train_begin(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Write the file, unless it is there."""
        if is_main_process() and not self.path.exists():
            kept = self.documents.select_columns(["input_ids", "prompt_tokens"])
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def kept_completions(folder: str | Path) -> Dataset | None:
    """Read what an earlier start of this run has sampled, if anything."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    say(f"resume  the model's own completions are in {path}")
    return as_documents(rows)
