"""Medusa: K heads on the last hidden state, each of which predicts one token further ahead.

    heads = MedusaHeads.on(model, num_heads=4)

    logits_k = W_k (h + SiLU(A_k h + b_k)),     head k predicts the token k + 1 places on

A_k and b_k start at 0 and W_k as a copy of the LM head, so each head starts as the LM head. The
names of the weights are those that vLLM reads. Cai et al., Medusa (2401.10774) section 2.1. Left
out: several residual blocks a head, and heads that share one LM head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.heads.ahead import Ahead
from posttrain.heads.few import DraftsFew
from posttrain.heads.trunk import Trunk, chunked_scores
from posttrain.packed.head import ScoringHead


class ResidualBlock(nn.Module):
    """Computes h + SiLU(A h + b), which is h at the start."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])
        nn.init.zeros_(self.layers[0].weight)
        nn.init.zeros_(self.layers[0].bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…, D)."""
        return hidden + F.silu(self.layers[0](hidden))


class MedusaHeads(DraftsFew, nn.Module):
    """K residual blocks and K LM heads; see the module's docstring."""

    kind, needs_layer, first_offset = "medusa", False, 2

    def __init__(self, num_heads: int, lm_head: ScoringHead) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(lm_head.in_features) for _ in range(num_heads))
        self.lm_heads = nn.ModuleList(_copy(lm_head) for _ in range(num_heads))

    @classmethod
    def on(cls, model: nn.Module, *, num_heads: int) -> MedusaHeads:
        """Make heads of a prepared model (bare or PEFT), on its device, in float32."""
        lm_head = model.get_output_embeddings()
        return cls(num_heads, lm_head).to(lm_head.weight.device)

    @property
    def depth(self) -> int:
        """K, the number of heads."""
        return len(self.blocks)

    def settings(self) -> dict[str, object]:
        """Return what config.json holds of these heads besides their sizes."""
        found = {"num_heads": self.depth, "num_hidden_layers": 1, "medusa_fc_bias": True}
        return found | self.of_tokens()

    def scores(self, trunk: Trunk, ahead: Sequence[Ahead], base: Ahead | None) -> list[Tensor]:
        """(1, S, 3) scores of the base targets, if there are any, then those of each head.

        One head after the other: its gradients are formed as its logits are, so that the logits of
        two heads never exist at once.
        """
        found = [] if base is None else [trunk.base_scores(base)]
        return found + self.head_scores(trunk.states, ahead)

    def head_scores(
        self, states: Tensor, ahead: Sequence[Ahead], *, temperature: float = 1.0
    ) -> list[Tensor]:
        """(1, S, 3) scores of each head's targets, from the (1, N, D) last states."""
        found = []
        for block, lm_head, (positions, targets) in zip(
            self.blocks, self.lm_heads, ahead, strict=True
        ):
            mine = block(states[:, positions])
            settings = {"equal_slopes": True, "temperature": temperature}
            found.append(chunked_scores(lm_head, mine, targets, **settings))
        return found


def _copy(lm_head: ScoringHead) -> ScoringHead:
    """An LM head of the same values in float32, trainable, with the same change of its logits."""
    new = nn.Linear(lm_head.in_features, lm_head.out_features, bias=lm_head.bias is not None)
    with torch.no_grad():
        new.weight.copy_(lm_head.weight)
        if lm_head.bias is not None:
            new.bias.copy_(lm_head.bias)
    new = ScoringHead.replacing(new)
    new.change = lm_head.change
    return new
