"""Routing replay: a mixture of experts trains each token with the experts that it was sampled with.

    with Recorder(model) as record:
        model(…)
        chosen = record.forwards.pop()            # (N, C) of the forward's N tokens
    replay = RoutingReplay(model)                 # for good
    model(…, packed=layout)                       # layout.experts: those that N tokens get, (N, C)

Sampling and training round differently, and a rounding decides between two experts whose scores are
close: then another function is trained than was sampled from. Here the choices are replayed, and
their weights come from the logits of the training forward, so routers have their gradient. C is
the choices of all routers side by side: where a router chooses among groups of experts first, that
choice too. Source: R3, arXiv 2510.11370.

transformers' routers choose by torch.topk; inside a router's forward it is answered here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from posttrain.errors import ConfigError
from posttrain.packed.batch import Segment, pack
from posttrain.packed.forward import computes_rows, in_evaluation, packed_logps
from posttrain.packed.prepare import probe_ids
from posttrain.packed.router import routers_of


class _Choosing(TorchFunctionMode):
    """Inside, `choose` may replace what topk chooses: (…, k) places, and those chosen before."""

    def __init__(self, choose: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.choose, self.num_before = choose, 0

    def __torch_function__(
        self, function: Any, _types: Any, arguments: tuple = (), named: dict | None = None
    ) -> Any:
        out = function(*arguments, **(named or {}))
        if function not in (torch.topk, Tensor.topk):
            return out
        chosen = self.choose(out.indices, self.num_before)
        if chosen is None:
            return out
        self.num_before += chosen.shape[-1]
        scores = arguments[0] if arguments else named["input"]
        return torch.return_types.topk((scores.gather(-1, chosen), chosen))


class _Hooks:
    """Watches the choices of a model's routers, in every forward of the model."""

    def __init__(self, model: nn.Module) -> None:
        routers = [module for module, _ in routers_of(model)]
        # JetMoe's attention is listed beside the router in it.
        outer = {id(m) for m in routers for inner in routers if _holds(m, inner)}
        self.model, self.routers = model, [m for m in routers if id(m) not in outer]
        self.rows = 0  # tokens of the forward
        self._modes: list[_Choosing] = []
        self._handles: list[Any] = []

    def watch(self) -> None:
        """Begin; also inside activation checkpoints, whose second run comes after the forward."""
        begin, end = self._begin, self._end
        self._handles = [self.model.register_forward_pre_hook(begin, with_kwargs=True)]
        self._handles.append(self.model.register_forward_hook(end))
        for number, router in enumerate(self.routers):
            enter = partial(self._enter, number)
            self._handles.append(router.register_forward_pre_hook(enter))
            self._handles.append(router.register_forward_hook(self._leave, always_call=True))

    def _begin(self, _model: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        self.rows = (named["input_ids"] if "input_ids" in named else arguments[0]).numel()

    def _end(self, *_: object) -> None: ...

    def _enter(self, number: int, *_: object) -> None:
        self._modes.append(_Choosing(partial(self._choose, number)))
        self._modes[-1].__enter__()

    def _leave(self, *_: object) -> None:
        self._modes.pop().__exit__(None, None, None)

    def _choose(self, number: int, places: Tensor, num_before: int) -> Tensor | None:
        raise NotImplementedError


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return outer is not inner and any(module is inner for module in outer.modules())


class Recorder(_Hooks):
    """Records what routers choose in the forwards inside `with`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.forwards: list[Tensor] = []  # (N, C) int16 each, of all tokens in the forward
        self.chosen: list[list[Tensor]] = []  # the last forward's, of each router

    def __enter__(self) -> Recorder:
        self.watch()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, *given: Any) -> None:
        super()._begin(*given)
        self.chosen = [[] for _ in self.routers]

    def _end(self, *_: object) -> None:
        parts = [part for of_router in self.chosen for part in of_router]
        self.forwards.append(torch.cat(parts, -1).short() if parts else torch.empty(self.rows, 0))

    def _choose(self, number: int, places: Tensor, _num_before: int) -> None:
        if places.shape[:-1].numel() == self.rows:  # else within groups, for the choice of a group
            self.chosen[number].append(places.reshape(self.rows, -1))


class RoutingReplay(_Hooks):
    """Lets forwards of packed batches whose layout has experts choose those, where it has any.

    model: as it is called, with an adapter around it if it has one.

    Raises ConfigError for a model without routers, and for one whose choices cannot be replayed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if problem := self._problem():
            raise ConfigError(f"--replay_routing: {problem}: leave --replay_routing out.")
        self.experts: Tensor | None = None
        self._changed: list[Tensor] = []
        self._num_choices: list[Tensor] = []
        self._num_columns = 0
        self.watch()

    def _problem(self) -> str | None:
        """Why the choices cannot be replayed; else what each router chooses is counted."""
        if not self.routers:
            return "the model has no routers"
        name = type(self.model).__name__
        weight = next(self.model.parameters())
        if weight.is_meta or hasattr(weight, "ds_id"):
            return f"{name} is divided over ranks as it is loaded, before its routers could be read"
        if computes_rows(self.model):
            return f"{name} is computed by rows (docs/models.md), which do not say what they chose"
        prompt, answers = probe_ids(self.model)
        segments = [Segment(prompt), *(Segment(ids, 0, [True] * len(ids)) for ids in answers)]
        batch = pack(segments, num_rows=1, device=weight.device)
        with torch.no_grad(), in_evaluation(self.model), Recorder(self.model) as record:
            packed_logps(self.model, batch)
        widths = []
        for router, chosen in zip(self.routers, record.chosen, strict=True):
            if not chosen:
                return f"{type(router).__name__} of {name} does not choose by torch.topk"
            widths.append(sum(places.shape[1] for places in chosen))
        self.starts = [sum(widths[:number]) for number in range(len(widths))]
        return None

    def _begin(self, _model: nn.Module, _arguments: tuple, named: dict[str, Any]) -> None:
        self.experts = getattr(named.get("packed"), "experts", None)
        self._changed, self._num_choices, self._num_columns = [], [], 0

    def _choose(self, number: int, places: Tensor, num_before: int) -> Tensor | None:
        if self.experts is None or places.shape[:-1].numel() != len(self.experts):
            return None
        start, k = self.starts[number] + num_before, places.shape[-1]
        self._num_columns += k
        given = self.experts[:, start : start + k].long().view_as(places)
        own = (given[..., None] == places[..., None, :]).any(-1)
        self._changed.append(((given >= 0) & ~own).sum())
        self._num_choices.append((given >= 0).sum())
        return torch.where(given < 0, places, given)

    def changed(self) -> tuple[Tensor, Tensor]:
        """Count the last forward's choices that were not its own, and all that it was given.

        Raises RuntimeError if that forward did not make each choice that was recorded.
        """
        if self._num_columns != self.experts.shape[1]:
            raise RuntimeError(
                f"{self._num_columns} of {self.experts.shape[1]} recorded choices of experts were "
                "replayed: the routers made others in training than in the rollout."
            )
        return torch.stack(self._changed).sum(), torch.stack(self._num_choices).sum()
