"""Heads of a loaded model, to draft tokens with.

    heads = load_heads(folder, model)                      # posttrain.heads
    logits = heads.draft_logits(hidden)                    # Medusa: all depths at once
    states, logits = heads.step(hidden, tokens, positions, depth=1, cache=cache)   # modules

Hidden states are those that the model's LM head gets (posttrain.packed.head.taking_states).
Drafting has no say in what a completion becomes: that is the decode loop's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.heads.few import FewLogits
from posttrain.heads.stacked import StackedHeads
from posttrain.heads.trunk import Call, bare, run_trunk
from posttrain.packed.batch import Segment, pack
from posttrain.packed.forward import packed_inputs


class GrowingCache:
    """Keys and values of one module for R rows, which grow with each step: (R, h, slots, d)."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def update(self, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new slots, and return all."""
        key = key.to(value.dtype)  # autocast leaves rotary outputs in float32
        if self.key is not None:
            key, value = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
        self.key, self.value = key, value
        return key, value

    def keep(self, num_slots: int) -> None:
        """Forget all slots but the first ones."""
        if self.key is not None:
            self.key, self.value = self.key[:, :, :num_slots], self.value[:, :, :num_slots]

    def select(self, rows: Int[Tensor, " R"]) -> None:
        """Keep these rows alone."""
        if self.key is not None:
            self.key, self.value = self.key[rows], self.value[rows]


class Heads:
    """Heads of a prepared causal LM. kind: medusa, mtp or parallel; depth: tokens beyond the next.

    Attributes:
        module: the layers themselves.
    """

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self.model, self.module = model, module
        self.kind, self.depth = module.kind, module.depth
        self._stacked = StackedHeads(module) if self.kind == "medusa" else None
        self._few = FewLogits(module) if self.kind == "mtp" else None

    @property
    def drafted_ids(self) -> list[int] | None:
        """Ids that the entries of logits stand for, ascending; None: all."""
        return getattr(self.module, "drafted_ids", None)

    @torch.no_grad()
    def draft_logits(
        self,
        hidden: Float[Tensor, "R D"],
        tokens: Int[Tensor, " R"] | None = None,  # noqa: ARG002  (Medusa does not look at them)
    ) -> Float[Tensor, "K R V"]:
        """Compute the logits of each Medusa head from the last states of R rows.

        Entry k - 1 is of the token k + 1 places after the state's own; see drafted_ids.

        Raises ConfigError for heads that need one step after the other.
        """
        if self.kind != "medusa":
            raise ConfigError(f"heads of kind {self.kind} draft one step after the other: step().")
        return self._stacked(hidden)

    def new_cache(self) -> GrowingCache:
        """Return an empty cache of one module."""
        return GrowingCache()

    @torch.no_grad()
    def prompt_states(self, prompts: Sequence[Sequence[int]]) -> list[Float[Tensor, "T D"]]:
        """Compute the states of the model at each token of each prompt, in one packed forward."""
        device = self.model.get_input_embeddings().weight.device
        segments = [Segment(prompt, row=row) for row, prompt in enumerate(prompts)]
        batch = pack(segments, num_rows=len(prompts), device=device)
        states = run_trunk(self.model, packed_inputs(batch))[0][0]
        return list(states.split([len(prompt) for prompt in prompts]))

    @torch.no_grad()
    def step(
        self,
        hidden: Float[Tensor, "R L D"],
        tokens: Int[Tensor, "R L"],
        positions: Int[Tensor, "R L"],
        *,
        depth: int = 1,
        cache: GrowingCache | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "R L D"], Float[Tensor, "R V"]]:
        """Run module `depth` on L more states; return its states, and logits after the last.

        Logits are of drafted_ids, where there are any.

        Args:
            hidden: states of the module before, or of the model for depth 1.
            tokens: the id `depth` places after each state's own token.
            positions: of the states.
            cache: keys and values of the earlier states of this module, which are added to.
            mask: (R, 1, L, slots) True where a state sees a slot; none: all that came before.
        """
        if self.kind != "mtp":
            raise ConfigError(f"heads of kind {self.kind} have no steps.")
        actor, length = bare(self.model), hidden.shape[1]
        embedded = actor.get_input_embeddings()(tokens)
        if mask is None:
            slots = length + (len(cache) if cache is not None else 0)
            mask = torch.ones(length, slots, dtype=torch.bool, device=hidden.device)
            mask = mask.tril(slots - length)[None, None]
        named = {
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": actor.base_model.rotary_emb(embedded, positions),
            "past_key_values": cache,
        }
        module = self.module.layers[depth - 1]
        states = module(hidden, embedded, Call(named=named))
        return states, self._few(actor.get_output_embeddings(), states[:, -1])
