"""Process reward modelling: scores such that the labels of a solution's steps are likely.

    trainer = ProcessRewardTrainer(model, args, solutions=solutions, tokenizer=tokenizer)

    L = -(1/S) sum over steps of log sigmoid(s) if the step is right, log sigmoid(-s) if it is wrong

s is read at the step's last token by a linear head on the trunk's last hidden state; no other token
is scored. Solutions of one problem share its tokens within a micro-batch. S counts the steps of the
whole optimizer batch, so that how it is cut changes nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from posttrain.data.encode import longest_sequence
from posttrain.errors import DataError
from posttrain.losses.reward_model import step_loss
from posttrain.packed.batch import upload
from posttrain.packed.forward import check_context
from posttrain.packed.scalar import (
    SEPARATOR_FILE,
    completion_positions,
    has_scalar_head,
    packed_scalars,
    prepare_scalar,
)
from posttrain.run.options import is_main_process
from posttrain.trainers.base import refuse_empty
from posttrain.trainers.reward import settle_padding
from posttrain.trainers.siblings import SiblingTrainer, pack_siblings, siblings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt_ids", "completion_ids", "step_ends", "labels")


class ProcessRewardTrainer(SiblingTrainer):
    """Trains a token classifier with one label (load_reward_model(…, kind=PER_STEP)) on steps
    (posttrain.data.load_steps).

    Args:
        separator: What the data has between two steps; it is saved beside the model, for those
            who look for steps in completions.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        solutions: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        separator: str = "\n",
        eval_solutions: Dataset | None = None,
        max_tokens_per_microbatch: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        check_solutions(solutions, eval_solutions)
        if not has_scalar_head(model):
            prepare_scalar(model, half=args.bf16 or args.fp16)
        check_context(model, longest_sequence(solutions, *COLUMNS[:2]), "Lower --max_length.")
        settle_padding(model, tokenizer)
        super().__init__(
            model,
            args,
            tokenizer=tokenizer,
            train_dataset=solutions,
            eval_dataset=eval_solutions,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            callbacks=callbacks,
        )
        self.separator = separator

    def count_items(self, examples: Sequence[dict]) -> int:
        """Count the steps."""
        return sum(len(row["labels"]) for row in examples)

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        """Sum the loss over the steps of one packed micro-batch."""
        rows = list(itertools.chain.from_iterable(siblings(examples)))
        device = self.args.device
        batch = pack_siblings(rows, device=device)
        labels = [label for row in rows for label in row["labels"]]
        (right,) = upload([labels], dtype=torch.bool, device=device)
        positions = completion_positions(batch, [row["step_ends"] for row in rows])
        scores = packed_scalars(model, batch, positions)  # (S,)
        found = scores.detach()
        self.note(label_accuracy=((found > 0) == right).float())
        for name, which in (("right_steps", right), ("wrong_steps", ~right)):
            share = ((found > 0) == right).float()
            self.metrics.add_all(which.float(), **{f"{name}_found": share, f"{name}_score": found})
        return step_loss(scores, right).sum()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and tokenizer as transformers does, and the separator of steps."""
        super().save_model(output_dir, _internal_call)
        if is_main_process():
            path = Path(output_dir or self.args.output_dir) / SEPARATOR_FILE
            path.write_text(json.dumps({"separator": self.separator}), encoding="utf-8")


def check_solutions(solutions: Dataset, eval_solutions: Dataset | None = None) -> None:
    """Raise DataError for columns or labels that are missing, or labels that are all alike."""
    refuse_empty(solutions, "solution")
    for dataset in filter(None, (solutions, eval_solutions)):
        missing = [column for column in COLUMNS if column not in dataset.column_names]
        if missing:
            raise DataError(
                f"expected solutions with the columns {', '.join(COLUMNS)} as load_steps makes "
                f"them; {', '.join(missing)} missing, found: {', '.join(dataset.column_names)}."
            )
        pairs = zip(dataset["step_ends"], dataset["labels"], strict=True)
        for number, (ends, labels) in enumerate(pairs):
            if not ends or len(ends) != len(labels) or None in labels:
                raise DataError(
                    f"solution {number}: expected one label, true or false, for each of its "
                    f"{len(ends)} steps; found {len(labels)}: {labels}."
                )
    everything = [label for labels in solutions["labels"] for label in labels]
    if not 0 < sum(everything) < len(everything):
        raise DataError(
            f"labels: expected right and wrong steps, found {sum(everything):,} right of "
            f"{len(everything):,}. There is nothing to tell apart; add solutions with the others."
        )
