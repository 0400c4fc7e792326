"""Supervised fine-tuning: the mean negative log-prob of the trained tokens.

    trainer = SFTTrainer(model, args, documents=documents, tokenizer=tokenizer, loss=nll_loss)

    L = -(1/N) sum over trained tokens of log p(token | what precedes it in its document)

N counts the trained tokens of the whole optimizer batch, over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy
from pyarrow.compute import list_flatten, list_value_length
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from posttrain.data.encode import Encoder
from posttrain.errors import DataError
from posttrain.losses.supervised import has_equal_slopes, nll_loss
from posttrain.packed.batch import pack_documents
from posttrain.packed.forward import check_context, packed_logps
from posttrain.trainers.base import PackedTrainer, refuse_empty

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CHECKED_ROWS = 1000  # at once, as arrays: an object for each token would cost minutes


class SFTTrainer(PackedTrainer):
    """Trains on documents with `input_ids` and `trained` (posttrain.data.load_documents).

    Data in which no end-of-sequence token is a target is refused with DataError, because such a
    model would never learn to stop.

    Args:
        loss: f(logps, mask) -> (B, T) nats per token, not reduced, 0 where the mask is 0: nll_loss
            or dft_loss of posttrain.losses.
    """

    teaches_to_stop = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        documents: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        eval_documents: Dataset | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = nll_loss,
        max_tokens_per_microbatch: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        refuse_empty(documents, "document")
        longest = _check_documents(documents, tokenizer, must_stop=self.teaches_to_stop)
        check_context(model, longest, "Lower --max_length.")
        super().__init__(
            model,
            args,
            tokenizer=tokenizer,
            train_dataset=documents,
            eval_dataset=eval_documents,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            callbacks=callbacks,
        )
        self.loss = loss

    def num_tokens(self, example: dict) -> int:
        """Count the tokens of one document."""
        return len(example["input_ids"])

    def count_items(self, examples: Sequence[dict]) -> int:
        """Count the trained tokens."""
        return sum(sum(example["trained"]) for example in examples)

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        """Sum the loss over the trained tokens of one packed micro-batch, in nats."""
        batch = pack_documents(examples, device=self.args.device)
        scores = packed_logps(
            model,
            batch,
            with_entropy=True,
            entropy_gradient=False,  # it is only logged
            equal_slopes=has_equal_slopes(self.loss),
        )
        self.note(token_accuracy=scores.is_argmax, entropy=scores.entropy)
        return self.loss(batch.dense(scores.logps), batch.mask()).sum()


def _check_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, must_stop: bool
) -> int:
    """Refuse rows that train on nothing, and data that never teaches the model to stop.

    Returns the tokens of the longest document.
    """
    stops, longest, start, end_ids = False, 0, 0, list(Encoder(tokenizer).end_ids)
    for batch in documents.with_format("arrow").iter(
        CHECKED_ROWS
    ):  # without a Python object a token
        lengths = list_value_length(batch["input_ids"]).to_numpy()
        ids = list_flatten(batch["input_ids"]).to_numpy()
        trained = list_flatten(batch["trained"]).to_numpy().astype(bool)
        rows = numpy.repeat(numpy.arange(len(lengths)), lengths)
        targets = numpy.bincount(rows[trained], minlength=len(lengths))
        if not targets.all():
            row = int(targets.argmin())
            raise DataError(
                f"document {start + row}: expected at least one trained token, found none of "
                f"{lengths[row]}. Is the answer empty, or cut off by --max_length?"
            )
        stops = stops or bool(numpy.isin(ids[trained], end_ids).any())
        longest, start = max(longest, int(lengths.max())), start + len(lengths)
    if must_stop and not stops:
        raise DataError(
            f"the end-of-sequence token {tokenizer.eos_token!r} is a target in none of "
            f"{len(documents)} documents, so the model would never learn to stop. "
            "Answers must end with it inside the trained part."
        )
    return longest
