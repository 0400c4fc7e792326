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
        self.logits: list[Tensor] = []
        self.chosen: dict[nn.Module, list[Tensor]] = {}  # by router, as it may run more than once
        self._hooks: list[Any] = []

    def __enter__(self) -> RouterWatch:
        self.logits, self.chosen = [], {}
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
        logits = outputs[index].flatten(0, -2)
        found = [x for x in outputs if isinstance(x, Tensor) and not x.is_floating_point()]
        chosen = found[-1].reshape(len(logits), -1) if found else logits.topk(self._top_k).indices
        if (counted := COUNTED.get()) is not None:
            logits, chosen = logits[counted], chosen[counted]
        self.logits.append(logits)
        self.chosen.setdefault(module, []).append(chosen)

    @property
    def _top_k(self) -> int:
        names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")
        return next((getattr(self.config, n) for n in names if getattr(self.config, n, None)), 1)

    def balanced(self, trainer: Trainer, model: nn.Module, part: Sequence[dict]) -> Tensor:
        """The trainer's loss of a micro-batch, with the balancing loss once for each item."""
        with self:
            loss = trainer.microbatch_loss(model, part)
        logits, chosen, self.logits, self.chosen = self.logits, self.chosen, [], {}
        if not logits:
            return loss
        experts = [torch.cat(parts) for parts in chosen.values()]
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
