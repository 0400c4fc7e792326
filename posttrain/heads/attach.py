"""Heads as a part of their model, so that DDP and the optimizer know one model.

    add_heads(model, heads)                      # a prepared causal LM, bare or PEFT
    scores = scores_ahead(model, batch, segments, with_base=True)
    with without_heads(model): model.save_pretrained(folder)

A forward without the request is the model's own. Left out: DeepSpeed and FSDP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from posttrain.errors import ConfigError
from posttrain.heads.ahead import Ahead, following, tokens_ahead
from posttrain.heads.distill import chunked_kl
from posttrain.heads.trunk import Trunk, attention_layer, bare, run_trunk
from posttrain.packed.batch import PackedBatch, Segment
from posttrain.packed.forward import computes_rows, packed_inputs
from posttrain.packed.head import TokenScores
from posttrain.run.engine import is_sharded

NAME = "lookahead"  # of the submodule


@dataclass
class _Request:
    """Asks a forward for targets of the model itself, if any, and of its heads.

    detach: heads read states without gradient. teacher: (1, N, D) states whose distribution takes
    the place of the base targets.
    """

    base: Ahead | None
    ahead: list[Ahead]
    following: list[Tensor]
    detach: bool
    teacher: Tensor | None


class ScoresAhead(NamedTuple):
    """Scores of the model itself, if it was asked, and of each head, the nearest first.

    Where there is a teacher, `base.logps` holds minus the KL of each position.
    """

    base: TokenScores | None
    heads: list[TokenScores]


class _LooksAhead:
    """Mixed into a causal LM's class: returns the scores of its heads, on request."""

    def forward(
        self,
        *arguments: Any,
        looking: _Request | None = None,
        logits_to_keep: Any = 0,
        **inputs: Any,
    ) -> Any:
        """Plain without `looking`; with it (1, S, 3) scores, one part after the other."""
        plain = super().forward
        if looking is None:
            return plain(*arguments, logits_to_keep=logits_to_keep, **inputs)
        heads = getattr(self, NAME)
        layer = attention_layer(self)[1] if heads.needs_layer else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not looking.detach):
            states, call = run_trunk(plain, inputs, layer=layer)
        trunk = Trunk(self, states, call, looking.following, looking.detach)
        if looking.teacher is None:
            scores = heads.scores(trunk, looking.ahead, looking.base)
        else:
            kl = chunked_kl(self.get_output_embeddings(), states, looking.teacher, looking.base)
            scores = [kl, *heads.scores(trunk, looking.ahead, None)]
        return CausalLMOutput(logits=torch.cat(scores, 1))


@cache
def _looking(family: type) -> type:
    """The class `family` with heads, under the same name as saved files know it."""
    return type(family.__name__, (_LooksAhead, family), {"__module__": family.__module__})


def add_heads(model: nn.Module, heads: nn.Module) -> None:
    """Make heads part of their model.

    Raises ConfigError where weights are sharded, and for prediction modules on a model that runs
    by rows.
    """
    if is_sharded():
        raise ConfigError(
            "heads: expected one process or accelerate_configs/ddp.yaml; found DeepSpeed or FSDP."
        )
    actor = bare(model)
    check_packed(actor, heads)
    actor.__class__ = _looking(type(actor))
    setattr(actor, NAME, heads)


def check_packed(model: nn.Module, heads: nn.Module) -> None:
    """Raise ConfigError for heads with layers of their own on a model that runs by rows."""
    if heads.needs_layer and computes_rows(model):
        raise ConfigError(
            f"{type(model).__name__} runs by rows, and prediction modules need packed attention. "
            "Take Medusa heads (recipes/medusa.py), which need the last states alone."
        )


def heads_of(model: nn.Module) -> nn.Module:
    """Return the heads that `add_heads` made part of this model."""
    return getattr(bare(model), NAME)


@contextmanager
def without_heads(model: nn.Module) -> Iterator[None]:
    """Take the heads out of their model for a while, to save, load or copy the model alone."""
    actor = bare(model)
    heads = actor._modules.pop(NAME)
    try:
        yield
    finally:
        actor._modules[NAME] = heads


def scores_ahead(
    model: nn.Module,
    batch: PackedBatch,
    segments: Sequence[Segment],
    *,
    with_base: bool,
    detach: bool = False,
    teacher: Tensor | None = None,
) -> ScoresAhead:
    """Run one forward of a packed batch and return the scores of all targets, head by head.

    Args:
        model: with heads, bare or wrapped by PEFT and DDP.
        segments: those that the batch was packed from.
        with_base: also score the next tokens by the model itself.
        detach: the heads' gradient ends at the model's states.
        teacher: (1, N, D) states of the model as it was (`trunk_states`); the base scores are then
            minus the KL(teacher || current) of each position, and the heads' as ever.
    """
    heads, device = heads_of(getattr(model, "module", model)), batch.input_ids.device
    first = heads.first_offset
    base, *ahead = tokens_ahead(segments, (1, *range(first, first + heads.depth)), device=device)
    needs_tokens = getattr(heads, "needs_tokens", False)
    depths = range(1, heads.depth + 1) if needs_tokens else ()
    tokens = [following(segments, depth, device=device) for depth in depths]
    base = base if with_base else None
    request = _Request(base, ahead, tokens, detach, teacher)
    scores = model(**packed_inputs(batch), looking=request).logits[0]
    sizes = [len(part.targets) for part in ([] if base is None else [base]) + ahead]
    parts = [TokenScores(*part.unbind(-1)) for part in scores.split(sizes)]
    return ScoresAhead(parts.pop(0) if with_base else None, parts)


@torch.no_grad()
def trunk_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """(1, N, D) states that the LM head of a prepared model gets, without gradient."""
    return run_trunk(model, packed_inputs(batch))[0]
