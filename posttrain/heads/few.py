"""Draft few tokens: texts of one kind have few different ones, and LM heads are large.

    heads.draft_tokens_of(counts)       # heads.drafted_ids: those that were trained on
    logits = FewLogits(heads)(lm_head, states)

A guess outside them would only be a wrong guess. Of SmolLM2-135M's 49,152 tokens 400 of its own
completions have 2,632, and a draft costs an eighteenth of its LM head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.packed.half import kept_multiplier
from posttrain.packed.head import ScoringHead

if TYPE_CHECKING:
    from datasets import Dataset


class DraftsFew:
    """Heads that draft all tokens, or those with ascending `drafted_ids`."""

    drafted_ids: list[int] | None = None

    def draft_tokens_of(self, counts: Sequence[int], share: float = 0.5) -> None:
        """Draft from now on tokens alone that were trained on, if they are few.

        counts: by token id, how often it was. share: of the vocabulary; with more all are drafted.
        """
        known = set(self.drafted_ids or ())
        ids = [token for token, count in enumerate(counts) if count or token in known]
        self.drafted_ids = ids if 0 < len(ids) <= share * len(counts) else None

    def of_tokens(self) -> dict[str, object]:
        """Return what config.json holds of the drafted tokens."""
        return {} if self.drafted_ids is None else {"drafted_ids": self.drafted_ids}


def token_counts(documents: Dataset, vocabulary: int) -> list[int]:
    """Return by token id how often it is trained on; documents: input_ids and trained."""
    counts = [0] * vocabulary
    for document in documents.select_columns(["input_ids", "trained"]):
        for token, trained in zip(document["input_ids"], document["trained"], strict=True):
            counts[token] += trained
    return counts


class Drafting(Protocol):
    """Heads with `drafted_ids`."""

    drafted_ids: list[int] | None


class FewLogits:
    """Logits of the tokens that heads draft, by the model's own LM head."""

    def __init__(self, heads: Drafting) -> None:
        self.heads, self.key = heads, None

    @torch.no_grad()
    def __call__(self, lm_head: ScoringHead, states: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Logits in float32; the rows of the weight are taken out of it again when it changes."""
        if self.heads.drafted_ids is None:
            return lm_head.change.applied(lm_head(states))
        weight, device = lm_head.weight, states.device.type
        key = (len(self.heads.drafted_ids), weight.data_ptr(), weight._version)
        if key != self.key:
            self.key, ids = key, torch.tensor(self.heads.drafted_ids, device=weight.device)
            self.weight = weight[ids]
            self.bias = None if lm_head.bias is None else lm_head.bias[ids]
        is_half = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_half else weight.dtype
        with torch.autocast(device, enabled=False):
            logits = kept_multiplier(self.weight, dtype)(states.to(dtype))
            if self.bias is not None:
                logits = logits + self.bias
        return lm_head.change.applied(logits)
