"""Reward modelling: scores such that people's choices are likely under Bradley and Terry's model.

    trainer = RewardTrainer(model, args, pairs=pairs, tokenizer=tokenizer, loss=bradley_terry_loss)

    L = -(1/B) sum over pairs of log sigmoid(r(x, chosen) - r(x, rejected))

r is read at each completion's last token, its end-of-sequence token, by a linear head on the
trunk's last hidden state (posttrain.packed.scalar). A pair's prompt is computed once for both
completions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from posttrain.data.encode import Encoder, longest_sequence
from posttrain.errors import ConfigError, DataError
from posttrain.losses.reward_model import bradley_terry_loss
from posttrain.packed.batch import pack_pairs
from posttrain.packed.forward import check_context
from posttrain.packed.scalar import has_scalar_head, last_positions, packed_scalars, prepare_scalar
from posttrain.trainers.base import PackedTrainer, refuse_empty
from posttrain.trainers.preference import PAIR_COLUMNS, inputs_of, row_tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


# How the names of special tokens show that no text holds them.
SPARE = re.compile("pad|reserved|unused", re.IGNORECASE)


class RewardTrainer(PackedTrainer):
    """Trains a sequence classifier with one label (posttrain.models.reward_model) on pairs
    (posttrain.data.load_pairs).

    Args:
        loss: f(chosen, rejected) -> (B,), the loss of each pair from its rewards, such as
            bradley_terry_loss with `margin` or `centering` bound. If the pairs have a column
            `margin`, the loss gets it by that name.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        pairs: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        loss: Callable[..., Tensor] = bradley_terry_loss,
        eval_pairs: Dataset | None = None,
        max_tokens_per_microbatch: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.loss_inputs = check_pairs(pairs, eval_pairs, loss)
        if not has_scalar_head(model):
            prepare_scalar(model, half=args.bf16 or args.fp16)
        check_context(model, longest_sequence(pairs, *PAIR_COLUMNS), "Lower --max_length.")
        settle_padding(model, tokenizer)
        super().__init__(
            model,
            args,
            tokenizer=tokenizer,
            train_dataset=pairs,
            eval_dataset=eval_pairs,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            callbacks=callbacks,
        )
        self.loss = loss

    def num_tokens(self, example: dict) -> int:
        """Count the packed tokens of a pair: the prompt once, and both completions."""
        return row_tokens(example)

    def count_items(self, examples: Sequence[dict]) -> int:
        """Count the pairs."""
        return len(examples)

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        """Sum the loss over the pairs of one packed micro-batch."""
        columns = {}
        if "margin" in self.loss_inputs:  # goes to the device with the tokens
            columns["margin"] = [pair["margin"] for pair in examples for _ in range(2)]
        batch = pack_pairs(examples, device=self.args.device, row_columns=columns)
        inputs = {name: batch.row_column(name)[0::2] for name in columns}
        rewards = packed_scalars(model, batch, last_positions(batch))  # chosen, rejected, chosen …
        chosen, rejected = rewards[0::2], rewards[1::2]  # (2B,) -> (B,)
        margin = (chosen - rejected).detach()
        self.note(
            pair_accuracy=(margin > 0).float(),
            margin=margin,
            reward=rewards.detach(),
            chosen_reward=chosen.detach(),
            rejected_reward=rejected.detach(),
        )
        return self.loss(chosen=chosen, rejected=rejected, **inputs).sum()


def check_pairs(
    pairs: Dataset, eval_pairs: Dataset | None, loss: Callable[..., Tensor]
) -> list[str]:
    """Return the names of what the loss gets, if it can be trained on these pairs.

    Raises DataError for columns that are missing or margins below 0, ConfigError for a loss that
    cannot take a margin that the pairs have. It needs no model.
    """
    refuse_empty(pairs, "pair")
    for dataset in filter(None, (pairs, eval_pairs)):
        _check_columns(dataset, like=pairs)
    return _loss_inputs(loss, has_margin="margin" in pairs.column_names)


def _loss_inputs(loss: Callable[..., Tensor], *, has_margin: bool) -> list[str]:
    """Names of what the loss gets; ConfigError if it cannot take a margin that the pairs have."""
    if not has_margin:
        names = inputs_of(loss, ("chosen", "rejected", "margin"))
        return [name for name in names if name != "margin"]
    bound = getattr(loss, "keywords", {})
    if "margin" in bound:
        raise ConfigError(
            f"loss: margin={bound['margin']} is bound, and the pairs have a column 'margin' of "
            "their own. Leave out one of them."
        )
    names = inputs_of(loss, ("chosen", "rejected", "margin"))
    if "margin" not in names:
        raise ConfigError(
            f"loss {getattr(loss, '__name__', loss)}: expected an argument margin, because the "
            f"pairs have a column 'margin'; found {', '.join(names)}. Remove the column, or use a "
            "loss that takes it."
        )
    return names


def _check_columns(pairs: Dataset, *, like: Dataset) -> None:
    """Refuse pairs without the columns of load_pairs, and margins below 0 or on one side only."""
    missing = [column for column in PAIR_COLUMNS if column not in pairs.column_names]
    if missing:
        raise DataError(
            f"expected pairs with the columns {', '.join(PAIR_COLUMNS)} as load_pairs makes them; "
            f"{', '.join(missing)} missing, found: {', '.join(pairs.column_names)}."
        )
    if ("margin" in pairs.column_names) != ("margin" in like.column_names):
        raise DataError(
            "one of pairs and eval_pairs has a column 'margin', the other has none. Give both one, "
            "or neither."
        )
    for row, margin in enumerate(pairs["margin"] if "margin" in pairs.column_names else ()):
        if margin is None or not (math.isfinite(margin) and margin >= 0):
            raise DataError(
                f"pair {row}: expected a margin of at least 0, found {margin}. Fill it in, or "
                "remove the column 'margin'."
            )


def settle_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give config and tokenizer a padding token that no text holds.

    transformers' classifiers score the last token that is not padding, and refuse batches without a
    padding token. One that ends texts, as many models have it, would hide the token that counts.
    Where the tokenizer has no other that is special and free, there is none.
    """
    ends = Encoder(tokenizer).end_ids
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    taken = {*ends, tokenizer.bos_token_id}
    spare = [i for i, token in special.items() if i not in taken and SPARE.search(token)]
    pads = [i for i in (tokenizer.pad_token_id, *spare, tokenizer.unk_token_id) if i is not None]
    pad = next((i for i in pads if i not in taken), None)
    model.config.pad_token_id = pad
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
