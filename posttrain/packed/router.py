"""Routers of mixtures of experts: how even their load is, and the loss that evens it.

    model.routers = RouterWatch(model)                 # by posttrain.packed.prepare
    loss = model.routers.balanced(trainer, model, part)

The load-balancing loss is transformers' own, of the tokens that one micro-batch computes: a shared
prompt's tokens count once, padding not at all. It is no mean over tokens, so unlike every other
loss here it depends on how a batch is cut into micro-batches (Switch, arXiv 2101.03961 Eq. 4).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError

# Places of a forward's flattened rows that count, where it has padding or computes tokens twice.
COUNTED: ContextVar[Tensor | None] = ContextVar("counted", default=None)
# How configs call the number of experts that a token goes through.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
BALANCING = "load_balancing_loss_func"  # in the modules of those models that have one


class Trainer(Protocol):
    """The parts of posttrain.trainers.base.PackedTrainer that are read here."""

    metrics: Any

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        """Sum the loss over the items of one packed micro-batch."""
        ...

    def count_items(self, examples: Sequence[dict]) -> int:
        """Count the items that the loss is a mean over."""
        ...


class RouterWatch:
    """Remembers what the routers of a model said in the forwards inside `with`.

    Where no gradient is computed, as in an evaluation, nothing is remembered.

    coef: weight of the balancing loss; by default the config's, if the config asks for router
        logits, which transformers' models add that loss for; else 0.

    Raises ConfigError for a weight above 0 and a model without such a loss.
    """

    def __init__(self, model: nn.Module, coef: float | None = None) -> None:
        self.routers, self.config = routers_of(model), model.config.get_text_config()
        if coef is None:
            asked = getattr(self.config, "output_router_logits", False)
            coef = getattr(self.config, "router_aux_loss_coef", 0.0) if asked else 0.0
        self.loss_function = balancing_function(model)
        if coef and not (self.routers and self.loss_function):
            raise ConfigError(
                "--router_aux_loss_coef: transformers has no load-balancing loss for "
                f"{type(model).__name__}. Leave it out."
            )
        self.coef = coef
        # What each router gave, and which of its tokens count. It may run more than once, and in an
        # activation checkpoint, where nothing may be computed that its second run would not.
        self.said: list[tuple[nn.Module, Tensor, list[Tensor], Tensor | None]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> RouterWatch:
        self.said = []
        for module, index in self.routers:
            note = partial(self._note, index=index)
            self._hooks.append(module.register_forward_hook(note))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _note(self, module: nn.Module, _inputs: Any, output: Any, *, index: int) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if not torch.is_grad_enabled() or not isinstance(outputs[index], Tensor):
            return
        whole = [x for x in outputs if isinstance(x, Tensor) and not x.is_floating_point()]
        self.said.append((module, outputs[index], whole, COUNTED.get()))

    def _read(
        self, logits: Tensor, whole: list[Tensor], counted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(T, E) logits and (T, k) experts of the tokens that count."""
        logits = logits.flatten(0, -2)
        num_tokens, num_experts = logits.shape
        chosen = logits.detach().topk(min(self._top_k, num_experts)).indices
        for tensor in whole:  # a router may choose otherwise than by its logits
            if tensor.dim() > 1 and tensor.shape[-1] <= num_experts:
                rows = tensor.flatten(0, -2)
                chosen = rows if len(rows) == num_tokens else chosen
        return (logits, chosen) if counted is None else (logits[counted], chosen[counted])

    @property
    def _top_k(self) -> int:
        return next((getattr(self.config, n) for n in TOP_K if getattr(self.config, n, None)), 1)

    def balanced(self, trainer: Trainer, model: nn.Module, part: Sequence[dict]) -> Tensor:
        """The trainer's loss of a micro-batch, with the balancing loss once for each item."""
        with self:
            loss = trainer.microbatch_loss(model, part)
        said, self.said = self.said, []
        if not said:
            return loss
        logits, by_router = [], {}
        for module, *given in said:
            found, chosen = self._read(*given)
            logits.append(found)
            by_router.setdefault(module, []).append(chosen)
        experts = [torch.cat(parts) for parts in by_router.values()]
        num_experts, top_k = logits[0].shape[-1], experts[0].shape[-1]
        counts = torch.stack([_counts(each, num_experts) for each in experts])
        busiest = (counts / counts.sum(1, keepdim=True)).max() * num_experts
        trainer.metrics.add("busiest_expert", busiest)  # of any layer, over an even load
        if not self.coef:
            return loss
        balancing = self.loss_function(tuple(logits), num_experts, top_k)
        trainer.metrics.add("router_aux_loss", balancing)
        return loss + self.coef * balancing * trainer.count_items(part)


def _counts(chosen: Tensor, num_experts: int) -> Tensor:
    counts, places = torch.zeros(num_experts, device=chosen.device), chosen.flatten().long()
    return counts.scatter_add(0, places, torch.ones_like(places, dtype=counts.dtype))


def routers_of(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """Return a model's router modules, and which of their outputs the logits are."""
    kinds: dict[type, int] = {}
    for module in model.modules():
        found = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        for recorder in found if isinstance(found, list) else [found] * (found is not None):
            kinds[getattr(recorder, "target_class", recorder)] = getattr(recorder, "index", 0)
    return [(m, kinds[type(m)]) for m in model.modules() if type(m) in kinds]


def balancing_function(model: nn.Module) -> Callable[..., Tensor] | None:
    """Return the load-balancing loss that transformers has for this model's family, if any."""
    for kind in type(model).__mro__:
        module = sys.modules.get(kind.__module__)
        if function := getattr(module, BALANCING, None):
            return function
    return None
