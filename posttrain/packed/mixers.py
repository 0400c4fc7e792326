"""Layers that mix tokens and know no packed layout: each runs by rows, and all else stays packed.

    mix_by_rows(model, recurrent_mixers(model))      # by posttrain.packed.prepare

Recurrent layers, convolutions, and attention that has a way of its own read the tokens before them
in the row that they are given. In a packed batch they get padded rows; embeddings, experts, norms
and the head, which look at one token at a time, run packed. A layer that goes on from a state gets
a shared prompt as a row, and its completions as others (posttrain.packed.states). Others get whole
sequences; a prompt's outputs are those of the first of its rows, and the same in all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.packed.batch import Layout
from posttrain.packed.forward import Step
from posttrain.packed.kernels import plan_of
from posttrain.packed.rows import FILL, Part, rows_plan
from posttrain.packed.states import cache_name, hand_on
from posttrain.run.engine import is_sharded
from posttrain.run.options import say

# What recurrent layers have of their own, and no other layer does.
RECURRENT = {"A_log", "slope_rate"}


def recurrent_mixers(model: nn.Module) -> list[nn.Module]:
    """Return the layers with a state or a convolution over tokens, the outermost of each."""
    own = [
        (name, module)
        for name, module in model.named_modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children())
        or RECURRENT.intersection(vars(module).get("_parameters", {}))
        or RECURRENT.intersection(vars(module).get("_buffers", {}))
    ]
    names = [name for name, _ in own]
    return [m for name, m in own if not any(name.startswith(f"{outer}.") for outer in names)]


def attention_layers(model: nn.Module, known: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the attention layers that did not call a packed kernel, unlike those in `known`."""
    seen = set(known)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and not seen.intersection(module.modules())
    ]
    names = [name for name, _ in found]
    return [m for name, m in found if not any(inner.startswith(f"{name}.") for inner in names)]


def mix_by_rows(model: nn.Module, mixers: list[nn.Module], *, masks: bool = False) -> None:
    """Make these layers of a causal LM compute packed batches by rows, with states where they can.

    masks: they take a (r, 1, L, L) mask to add to scores, instead of a (r, L) one of padding.
    """
    trunk = model.base_model
    if not mixers:
        return
    if not hasattr(trunk, "mixers"):
        trunk.mixers = []
        trunk.register_forward_pre_hook(_tell_layout, with_kwargs=True)
    width, names = getattr(model.config.get_text_config(), "hidden_size", None), {}
    for mixer in mixers:
        mixer.__class__ = kind = _by_rows(type(mixer))
        mixer.layout, mixer.adds_mask, mixer.cache_name = None, masks, None
        if kind not in names:
            names[kind] = None if masks else cache_name(mixer, width)
        mixer.cache_name = names[kind]
    trunk.mixers += mixers


def mix_others(model: nn.Module, callers: list[nn.Module]) -> bool:
    """Make all that is left compute by rows, but what called a packed kernel; False if none is."""
    known = getattr(model.base_model, "mixers", [])
    recurrent = [mixer for mixer in recurrent_mixers(model) if mixer not in known]
    own = attention_layers(model, [*callers, *known, *recurrent])
    mix_by_rows(model, recurrent)
    mix_by_rows(model, own, masks=True)
    return bool(recurrent or own)


def say_how(model: nn.Module) -> None:
    """Say which layers run by whole rows, and which hand on states."""
    ways = {False: "run by rows, all else packed", True: "hand a prompt's state to its completions"}
    for hands_on, how in ways.items():
        mixers = [m for m in model.base_model.mixers if bool(m.cache_name) == hands_on]
        if mixers:
            kinds = ", ".join(sorted({type(mixer).__name__ for mixer in mixers}))
            say(f"mixers  {len(mixers)} layers {how}: {kinds}")


def undo_mixers(model: nn.Module) -> None:
    """Give all layers back their own forward."""
    mixers = getattr(model.base_model, "mixers", [])
    for mixer in mixers:
        mixer.__class__ = type(mixer).__mro__[1]
    mixers.clear()


def _tell_layout(trunk: nn.Module, _inputs: Any, keywords: dict[str, Any]) -> None:
    # An attribute and no context variable: activation checkpoints run layers again in the backward.
    for mixer in trunk.mixers:
        mixer.layout = keywords.get("packed")


@cache
def _by_rows(kind: type) -> type:
    """The class `kind` with a forward for packed batches, under the same name."""
    plain = kind.forward
    takes_mask = "attention_mask" in inspect.signature(plain).parameters

    @wraps(plain)
    def forward(self: nn.Module, *arguments: Any, **keywords: Any):
        layout = self.layout
        if layout is None:
            return plain(self, *arguments, **keywords)
        if isinstance(layout, Step):
            raise ValueError(f"{kind.__name__} has a state, which the decode loop does not keep")
        keywords.pop("packed", None)
        num_tokens = sum(layout.lengths)

        def call(part: Part, **state: Any) -> tuple:
            given, named = _rows_of((arguments, keywords), part, num_tokens)
            if takes_mask:
                named["attention_mask"] = _added(part.mask) if self.adds_mask else part.mask
            found = plain(self, *given, **(named | state))
            return found if isinstance(found, tuple) else (found,)

        if self.cache_name and max(layout.parents) >= 0 and not is_sharded():
            merged, *more = hand_on(call, layout, self.cache_name)
        else:
            merged, *more = _by_whole_rows(call, layout)
        return (merged, *more) if more else merged

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _by_whole_rows(call: Callable[[Part], tuple], layout: Layout) -> tuple:
    plan = plan_of(layout, rows_plan, 0.0 if is_sharded() else FILL)
    outputs, more = [], ()
    for part in plan.parts:
        found, *more = call(part)
        outputs.append(found.flatten(0, 1)[part.new])
    return torch.cat(outputs)[plan.order][None], *more


def _rows_of(value: Any, part: Part, num_tokens: int) -> Any:
    """The value with each (1, N, …) tensor in it as (r, L, …) rows."""
    if isinstance(value, Tensor):
        is_packed = value.shape[:2] == (1, num_tokens)
        return value[0][part.tokens] if is_packed else value
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(each, part, num_tokens) for each in value)
    if isinstance(value, dict):
        return {name: _rows_of(each, part, num_tokens) for name, each in value.items()}
    return value


def _added(mask: Tensor) -> Tensor:
    """(r, 1, L, L) to be added to scores: 0 where a token sees, else the least number."""
    length = mask.shape[1]
    ones = torch.ones(length, length, dtype=torch.bool, device=mask.device)
    sees = (ones.tril() & mask[:, None, :].bool()) | ones.tril().triu()  # padding sees itself
    return torch.where(sees, 0.0, torch.finfo(torch.float32).min)[:, None]
