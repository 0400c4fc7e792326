"""Reward modelling: scores such that people's choices are likely under Bradley and Terry's model.

    L = -(1/B) sum over pairs of log sigmoid(r(x, chosen) - r(x, rejected))

r is read at each answer's last token, its end-of-sequence token, by a linear head on the trunk's
last hidden state (posttrain.packed.scalar). A pair's prompt is computed once for both answers.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.data.encode import Encoder
from posttrain.errors import ConfigError, DataError
from posttrain.losses.reward_model import bradley_terry_loss
from posttrain.packed.batch import pack_pairs
from posttrain.packed.prepare import check_context
from posttrain.packed.scalar import has_scalar_head, last_positions, packed_scalars, prepare_scalar
from posttrain.trainers.base import PackedTrainer, refuse_empty

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class RewardTrainer(PackedTrainer):
    """Trains a sequence classifier with one label (posttrain.models.reward_model) on pairs
    (posttrain.data.load_pairs).

    loss: f(chosen, rejected) -> (B,) of rewards, settings bound: bradley_terry_loss with `margin`
    or `centering`. Where the pairs have a column `margin`, it is passed to the loss by that name.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        pairs: Any,
        tokenizer: Any,
        loss: Callable[..., Tensor] = bradley_terry_loss,
        eval_pairs: Any = None,
        **settings: Any,
    ) -> None:
        refuse_empty(pairs, "pair")
        for dataset in filter(None, (pairs, eval_pairs)):
            _check_pairs(dataset, like=pairs)
        self.inputs = _inputs_of(loss, pairs.column_names)
        if not has_scalar_head(model):
            prepare_scalar(model, half=args.bf16 or args.fp16)
        lengths = zip(*(pairs[column] for column in COLUMNS), strict=True)
        longest = max(len(p) + max(len(c), len(r)) for p, c, r in lengths)
        check_context(model, longest, "Lower --max_length.")
        _settle_padding(model, tokenizer)
        super().__init__(
            model, args, tokenizer=tokenizer, train_dataset=pairs, eval_dataset=eval_pairs,
            **settings,
        )  # fmt: skip
        self.loss = loss

    def num_tokens(self, example: dict) -> int:
        return sum(len(example[column]) for column in COLUMNS)

    def count_items(self, examples: Sequence[dict]) -> int:
        return len(examples)

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        batch = pack_pairs(examples, device=self.args.device)
        rewards = packed_scalars(model, batch, last_positions(batch))  # chosen, rejected, chosen …
        chosen, rejected = rewards[0::2], rewards[1::2]
        margin = (chosen - rejected).detach()
        self._note(
            pair_accuracy=(margin > 0).float(), margin=margin, reward=rewards.detach(),
            chosen_reward=chosen.detach(), rejected_reward=rejected.detach(),
        )  # fmt: skip
        given = {
            name: torch.tensor([pair[name] for pair in examples], device=rewards.device)
            for name in self.inputs
        }
        return self.loss(chosen, rejected, **given).sum()

    def _note(self, **values: Tensor) -> None:
        for name, tensor in values.items():
            self.metrics.add(name, tensor.sum(), len(tensor))


def _check_pairs(pairs: Any, *, like: Any) -> None:
    missing = [column for column in COLUMNS if column not in pairs.column_names]
    if missing:
        raise DataError(
            f"expected pairs with the columns {', '.join(COLUMNS)} as load_pairs makes them; "
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


def _inputs_of(loss: Callable[..., Tensor], columns: Sequence[str]) -> list[str]:
    """Columns that the loss is given beside the rewards; ConfigError if it cannot take them."""
    inputs = [name for name in columns if name == "margin"]
    bound = getattr(loss, "keywords", {})
    try:
        inspect.signature(loss).bind("chosen", "rejected", **dict.fromkeys(inputs))
    except TypeError as error:
        raise ConfigError(
            f"loss {getattr(loss, '__name__', loss)}: expected "
            f"f({', '.join(['chosen', 'rejected', *inputs])}), all else bound with "
            f"functools.partial; found f{inspect.signature(loss)} ({error})."
        ) from None
    for name in inputs:
        if name in bound:
            raise ConfigError(
                f"loss: {name}={bound[name]} is bound, and the pairs have a column {name!r} of "
                "their own. Leave out one of them."
            )
    return inputs


def _settle_padding(model: nn.Module, tokenizer: Any) -> None:
    """transformers' classifiers read the last token that is not padding. Where padding is the
    end-of-sequence token, that would be the one before: without it they refuse padded batches."""
    pad = tokenizer.pad_token_id
    model.config.pad_token_id = None if pad in Encoder(tokenizer).end_ids else pad
