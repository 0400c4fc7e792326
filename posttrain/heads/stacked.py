"""Medusa heads in a few products for all of them, on the tokens that they know.

    drafting = StackedHeads(heads)
    logits = drafting(hidden)               # (K, R, V'), of heads.drafted_ids where it has them

In a decode loop a head costs as much as the LM head that it began as: of SmolLM2-135M four have
five sixths of the model's weights. But texts of one kind have few different tokens, and a guess
outside them would only be a wrong guess. What is made of the weights is kept until they change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.packed.half import kept_multiplier, wide

if TYPE_CHECKING:
    from posttrain.heads.medusa import MedusaHeads

# Weights up to which the LM heads are multiplied as one; larger ones are laid out one by one.
MOST_STACKED = 2**25


class StackedHeads:
    """Computes the logits of all heads; see the module's docstring."""

    def __init__(self, heads: MedusaHeads) -> None:
        self.heads, self.key = heads, None
        self.parameters = list(heads.parameters())

    @torch.no_grad()
    def __call__(self, hidden: Float[Tensor, "R D"]) -> Float[Tensor, "K R V"]:
        """Logits from the last states of R rows, the nearest head first."""
        device = hidden.device.type
        is_half = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_half else self.heads.lm_heads[0].weight.dtype
        self._stack(dtype)
        change = self.heads.lm_heads[0].change
        with torch.autocast(device, enabled=False):
            states = hidden.to(dtype).expand(self.heads.depth, -1, -1)
            states = states + F.silu(torch.baddbmm(self.bias, states, self.weight))
            if self.head_weight is not None:
                logits = torch.bmm(states, self.head_weight).to(wide(dtype))
            else:
                weights = [lm_head.weight for lm_head in self.heads.lm_heads]
                each = zip(weights, states, strict=True)
                logits = torch.stack([kept_multiplier(w, dtype)(x) for w, x in each])
            if self.head_bias is not None:
                logits = logits + self.head_bias
        return change.applied(logits)

    def _stack(self, dtype: torch.dtype) -> None:
        """Make the stacked weights anew if the heads' have changed, or are asked for in a dtype."""
        ids, lm_heads = self.heads.drafted_ids, self.heads.lm_heads
        key = (dtype, len(ids or ()), *((p.data_ptr(), p._version) for p in self.parameters))
        if key == self.key:
            return
        self.key, linear = key, [block.layers[0] for block in self.heads.blocks]
        self.weight = torch.stack([layer.weight.T for layer in linear]).to(dtype)
        self.bias = torch.stack([layer.bias[None] for layer in linear]).to(dtype)
        rows = torch.tensor(ids, device=self.weight.device) if ids else slice(None)
        number = len(ids or lm_heads[0].weight)
        self.head_weight = self.head_bias = None
        if ids or number * self.weight[:, 0].numel() <= MOST_STACKED:
            stacked = torch.stack([lm_head.weight[rows] for lm_head in lm_heads])
            self.head_weight = stacked.to(dtype).transpose(1, 2)
        if lm_heads[0].bias is not None:
            biases = [lm_head.bias[None, rows] for lm_head in lm_heads]
            self.head_bias = torch.stack(biases).to(wide(dtype))
