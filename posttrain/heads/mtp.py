"""Multi-token prediction: DeepSeek-V3's modules in sequence, and Gloeckle's heads in parallel.

    heads = MTPModules.on(model, num_modules=1, order="embedding_hidden")
    heads = ParallelHeads.on(model, num_heads=4)

Module k of DeepSeek-V3, at position i, with h^0 the state that the LM head gets:

    h'_i = M_k [norm(Emb(t_{i+k})); norm(h_i^{k-1})],  g^k = layer_k(h'),  h^k = norm(g^k)

and the model's LM head makes of h_i^k the distribution of t_{i+k+1}. `order` says which comes first
in the brackets: released weights of DeepSeek, Qwen and GLM have embedding_hidden, the report's
formula and MiMo hidden_embedding. The next module gets h^k after its norm, as vLLM hands it on.

A new module starts as the model's last layer once more: M_k passes the hidden state through and
nothing of the embedding, the layer and the norm are copies. DeepSeek-V3 (2412.19437) section 2.2;
Gloeckle et al. (2404.19737) section 2. Left out: layers moved from the trunk into parallel heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.heads.ahead import Ahead
from posttrain.heads.few import DraftsFew
from posttrain.heads.names import layout_of, share_parts
from posttrain.heads.trunk import (
    Call,
    Trunk,
    attention_layer,
    bare,
    chunked_scores,
    final_norm,
    new_layer,
    new_norm,
)

Order = Literal["embedding_hidden", "hidden_embedding"]


class MTPModule(nn.Module):
    """One module of DeepSeek-V3: two norms, a projection, a layer of the model, a norm."""

    def __init__(self, model: nn.Module, order: Order) -> None:
        super().__init__()
        norm, self.order = final_norm(model), order
        size = next(norm.parameters()).shape[0]
        device = next(norm.parameters()).device
        self.enorm, self.hnorm = new_norm(norm, copied=False), new_norm(norm, copied=False)
        self.eh_proj = nn.Linear(2 * size, size, bias=False, device=device)
        parts = [torch.zeros(size, size), torch.eye(size)]
        with torch.no_grad():
            self.eh_proj.weight.copy_(torch.cat(self.ordered(*parts), 1))
        self.block, self.norm = new_layer(model), new_norm(norm, copied=True)

    def ordered(self, embedding: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return both in the order of the projection's inputs."""
        return (embedding, hidden) if self.order == "embedding_hidden" else (hidden, embedding)

    def forward(self, hidden: Tensor, embedded: Tensor, call: Call) -> Tensor:
        """(1, N, D) states before this module and embeddings of the tokens -> its (1, N, D)."""
        both = self.ordered(self.enorm(embedded), self.hnorm(hidden))
        return self.norm(call.of(self.block, self.eh_proj(torch.cat(both, -1))))


class _SharedHead(nn.Module):
    """Heads that end in the model's own LM head, all of whose targets are scored in one call."""

    needs_layer, first_offset = True, 2

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def depth(self) -> int:
        """The number of tokens that are predicted beyond the next one."""
        return len(self.layers)

    def states(self, trunk: Trunk) -> Iterator[Tensor]:
        """Yield the (1, N, D) states of each depth, as the LM head gets them."""
        raise NotImplementedError

    def scores(self, trunk: Trunk, ahead: Sequence[Ahead], base: Ahead | None) -> list[Tensor]:
        """(1, S, 3) scores of the base targets, if there are any, then those of each depth.

        In one call of the LM head: one chunk of logits exists at a time, and one gradient of its
        weight.
        """
        states = [] if base is None else [trunk.states[:, base.positions]]
        parts = [*([] if base is None else [base]), *ahead]
        for deeper, targets in zip(self.states(trunk), ahead, strict=True):
            states.append(deeper[:, targets.positions])
        lm_head = trunk.shared(trunk.model.get_output_embeddings())
        targets = torch.cat([part.targets for part in parts])
        joined = torch.cat(states, 1)
        scores = chunked_scores(lm_head, joined, targets, equal_slopes=len(parts) == 1)
        return list(scores.split([len(part.targets) for part in parts], 1))


class MTPModules(DraftsFew, _SharedHead):
    """D modules in sequence; see the module's docstring."""

    kind, needs_tokens = "mtp", True
    fused_experts = False  # how the checkpoint had them, see posttrain.heads.names

    @classmethod
    def on(
        cls, model: nn.Module, *, num_modules: int, order: Order = "embedding_hidden"
    ) -> MTPModules:
        """Make modules of a prepared model (bare or PEFT), on its device, in float32."""
        heads = cls([MTPModule(model, order) for _ in range(num_modules)])
        if (layout := layout_of(bare(model).config)) and layout.shares_parts:
            share_parts(heads)
        return heads

    @property
    def order(self) -> Order:
        """Return what comes first in the projections' inputs."""
        return self.layers[0].order

    def settings(self) -> dict[str, object]:
        """Return what config.json holds of these modules besides their sizes."""
        return {"num_modules": self.depth, "order": self.order, **self.of_tokens()}

    def states(self, trunk: Trunk) -> Iterator[Tensor]:
        """Yield the (1, N, D) states of each depth, after its norm."""
        embed = trunk.shared(bare(trunk.model).get_input_embeddings())
        hidden = trunk.states
        for module, ids in zip(self.layers, trunk.following, strict=True):
            hidden = module(hidden, embed(ids[None]), trunk.call)
            yield hidden


class ParallelHeads(_SharedHead):
    """n - 1 layers beside the model's last one, each predicting one token further ahead.

    Head 1 is the model's own last layer. The others get what it gets, start as copies of it, and
    share the norm after it and the LM head.
    """

    kind, needs_tokens = "parallel", False

    @classmethod
    def on(cls, model: nn.Module, *, num_heads: int) -> ParallelHeads:
        """Make heads 2 to num_heads of a prepared model, on its device, in float32.

        Raises ConfigError where the last layer is not one of attention.
        """
        if attention_layer(model)[1] is not bare(model).base_model.layers[-1]:
            raise ConfigError(
                f"{type(bare(model)).__name__}: expected a last layer with full attention, beside "
                "which parallel heads stand; found another kind. Take modules in sequence."
            )
        return cls([new_layer(model) for _ in range(num_heads - 1)])

    def settings(self) -> dict[str, object]:
        """Return what config.json holds of these heads besides their sizes."""
        return {"num_heads": self.depth + 1}

    def states(self, trunk: Trunk) -> Iterator[Tensor]:
        """Yield the (1, N, D) states of heads 2, 3, …, after the model's norm."""
        norm = trunk.shared(final_norm(trunk.model))
        for layer in self.layers:
            yield norm(trunk.call.of(layer, trunk.call.states))
