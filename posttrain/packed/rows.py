"""Models that packing cannot serve: each sequence a row of its own, a prompt in each of its rows.

    compute_rows(model)                  # by posttrain.packed.prepare, where packing is not exact
    packed_logps(model, batch)           # as for any other model

Outside, nothing differs: a packed batch goes in, and what comes out belongs to its packed tokens.
In between the paths of the batch become padded rows of similar lengths, the model runs on them as
it came, and the states before its LM head are put back in the order of the packed row. A prompt's
states are taken from the first of its rows; they are the same in all, and so is their gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from posttrain.errors import ConfigError
from posttrain.packed.batch import Layout, upload
from posttrain.packed.forward import computes_rows
from posttrain.packed.head import is_scoring, taking_states
from posttrain.packed.kernels import plan_of
from posttrain.packed.router import COUNTED
from posttrain.run.engine import is_sharded, rank_and_world

# Rows share a call while each is at least this share of its longest one, give or take some tokens.
# Where ranks communicate in every call they must make equally many: there all rows share one.
FILL, SLACK = 0.75, 8


@dataclass(frozen=True)
class Part:
    """Rows that are computed together: r of them, padded to L tokens."""

    tokens: Tensor  # (r, L) packed positions; 0 where there is padding
    mask: Tensor  # (r, L) 1 where there is a token
    new: Tensor  # (n,) places in the flat (r * L) of packed tokens that no earlier row has
    images: list[list]  # those of each row, see posttrain.packed.vision


@dataclass(frozen=True)
class Plan:
    """The rows of a packed batch."""

    parts: list[Part]
    order: Tensor  # (N,) where the state of packed token n lies among those of all parts


def rows_plan(layout: Layout, fill: float) -> Plan:
    """Cut the paths of a packed batch into rows; see FILL."""
    is_parent = set(layout.parents)
    leaves = [i for i in range(len(layout.starts)) if i not in is_parent]
    paths = [torch.cat([torch.arange(*r) for r in layout.key_ranges(i)]) for i in leaves]
    return make_plan(similar(paths, fill), layout)


def similar(paths: list[Tensor], fill: float) -> list[list[Tensor]]:
    """Group paths by their lengths, the longest first; see FILL."""
    groups: list[list[Tensor]] = []
    for path in sorted(paths, key=len, reverse=True):
        longest = len(groups[-1][0]) if groups else 0
        shortest = longest if fill == 1 else fill * longest - SLACK
        if groups and len(path) >= shortest:
            groups[-1].append(path)
        else:
            groups.append([path])
    return groups


def make_plan(groups: list[list[Tensor]], layout: Layout, num_first: int = 0) -> Plan:
    """Make each group of paths a part.

    num_first: parts that are padded on the left; those after them get two tokens at least.
    """
    seen = torch.zeros(sum(layout.lengths), dtype=torch.bool)
    found, parts = [], []
    for index, group in enumerate(groups):
        is_first = index < num_first
        longest, places = max(len(group[0]), 2 if num_first and not is_first else 1), []
        tokens = torch.zeros(len(group), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, path in enumerate(group):
            start = longest - len(path) if is_first else 0
            tokens[row, start : start + len(path)] = path
            mask[row, start : start + len(path)] = 1
            new = (~seen[path]).nonzero().squeeze(1)
            seen[path] = True
            found.append(path[new])
            places.append(new + row * longest + start)
        parts.append((tokens, mask, torch.cat(places)))
    order = torch.cat(found).argsort()
    flat = [x.flatten() for part in parts for x in part]
    *flat, order = upload([*flat, order], dtype=torch.long, device=layout.device)
    triples = zip(flat[::3], flat[1::3], flat[2::3], parts, groups, strict=True)
    shown = _images_by_end(layout) if layout.images else {}
    parts = [
        Part(
            tokens.view_as(part[0]),
            mask.view_as(part[0]),
            new,
            [shown[int(path[-1])] for path in group] if shown else [],
        )
        for tokens, mask, new, part, group in triples
    ]
    return Plan(parts, order)


def _images_by_end(layout: Layout) -> dict[int, list]:
    """For the last token of each segment the images on the path to it, in order."""
    found: dict[int, list] = {}
    ends = [start + length - 1 for start, length in zip(layout.starts, layout.lengths, strict=True)]
    for segment, end in enumerate(ends):
        parent = layout.parents[segment]
        before = found[ends[parent]] if parent >= 0 else []
        found[end] = [*before, *layout.images.get(segment, ())]
    return found


def plan_for(model: nn.Module, layout: Layout) -> Plan:
    """Return which rows a packed batch becomes for this model."""
    fill = FILL if model.rows_padded else 1.0
    if is_sharded():
        if not model.rows_padded:
            raise ConfigError(
                f"{type(model).__name__} runs by rows of equal lengths, as many calls as there are "
                "lengths, which ranks under DeepSpeed and FSDP cannot do in step. Use "
                "accelerate_configs/ddp.yaml."
            )
        fill = 0.0
    return plan_of(layout, rows_plan, fill)


def row_inputs(model: nn.Module, part: Part, input_ids: Tensor) -> dict[str, Tensor]:
    """Return the ids of a part's rows, with a mask where rows are padded."""
    ids = input_ids[0][part.tokens].masked_fill(part.mask == 0, pad_id(model))
    inputs = {"input_ids": ids} | ({"attention_mask": part.mask} if model.rows_padded else {})
    vision = getattr(model, "vision_inputs", None)
    if vision is not None:
        return inputs | vision.of_rows(model, ids, part.images)
    if any(part.images):
        raise ConfigError(
            f"{type(model).__name__} was loaded without its processor, and the data has images. "
            "Load it with load_model(config, images=True)."
        )
    return inputs


def packed_states(
    run: Callable[..., Tensor], input_ids: Tensor, layout: Layout, model: nn.Module
) -> Tensor:
    """(1, N, D) states of a packed batch, by a function from rows to their (r, L, D) states."""
    plan, states = plan_for(model, layout), []
    for part in plan.parts:
        token = COUNTED.set(part.new)
        try:
            states.append(run(**row_inputs(model, part, input_ids)).flatten(0, 1)[part.new])
        finally:
            COUNTED.reset(token)
    return torch.cat(states)[plan.order][None]


def trunk_states(model: nn.Module, *, packed: Layout, input_ids: Tensor, **inputs: Any) -> Tensor:
    """(1, N, D) states before the head of a classifier on a packed batch, packed or by rows."""
    if not computes_rows(model):
        return model.base_model(packed=packed, input_ids=input_ids, **inputs).last_hidden_state
    run = _runner(model.base_model, model.base_model.forward)
    return packed_states(lambda **rows: run(**rows).last_hidden_state, input_ids, packed, model)


def compute_rows(model: nn.Module, *, padded: bool) -> None:
    """Make a causal LM with a scoring head take packed batches by rows.

    padded: with an attention mask and rows of similar lengths together; else of equal ones.
    """
    model.rows_padded = padded
    if not hasattr(model, "plain_forward"):
        model.__class__ = _by_rows(type(model))


def undo_rows(model: nn.Module) -> None:
    """Give the model back its own forward."""
    if hasattr(model, "plain_forward"):
        model.__class__ = type(model).__mro__[1]
    model.rows_padded = None


def pad_id(model: nn.Module) -> int:
    """The id that padding has: the config's, since some models count positions by it."""
    found = getattr(model.config.get_text_config(), "pad_token_id", None)
    return found if found is not None and found >= 0 else 0


@cache
def _by_rows(family: type) -> type:
    """The class `family` with a forward for packed batches, under the same name."""
    plain = family.forward

    @wraps(plain)  # `generate` reads the signature
    def forward(self: nn.Module, *arguments: Any, packed: Layout | None = None, **inputs: Any):
        if packed is None:
            return plain(self, *arguments, **inputs)
        input_ids, positions = inputs["input_ids"], inputs["logits_to_keep"]
        head, plan = self.get_output_embeddings(), plan_for(self, packed)
        if is_sharded():  # one call of the head, too
            places = plan.parts[0].new[plan.order][positions]
            with taking_states(places=places):
                run = _runner(self, self.plain_forward)
                return run(**row_inputs(self, plan.parts[0], input_ids))
        logits = head(head_states(self, input_ids, packed)[:, positions])
        return CausalLMOutput(logits=logits if is_scoring() else head.change.applied(logits))

    own = {"forward": forward, "plain_forward": plain, "__module__": family.__module__}
    return type(family.__name__, (family,), own)


def head_states(model: nn.Module, input_ids: Tensor, packed: Layout) -> Tensor:
    """(1, N, D) states that the LM head of a causal LM would get, by rows."""
    run = _runner(model, model.plain_forward)

    def caught(**rows: Tensor) -> Tensor:
        states: list[Tensor] = []
        with taking_states(into=states):
            run(**rows)
        return states[-1]

    states = packed_states(caught, input_ids, packed, model)
    vision = getattr(model, "vision_inputs", None)
    if vision is None or packed.images or not torch.is_grad_enabled() or rank_and_world()[1] == 1:
        return states
    # DDP waits for a gradient of every weight, also of those that see the images of other ranks.
    return states + 0 * caught(**vision.made_row(model, input_ids.device)).sum()


def _runner(module: nn.Module, forward: Callable) -> Callable[..., Any]:
    """`forward` with those of the usual keywords that it takes."""
    parameters = inspect.signature(forward).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    usual = {"use_cache": False, "return_dict": True}
    usual = {name: value for name, value in usual.items() if takes_all or name in parameters}
    call = module if forward == module.forward else forward
    return partial(call, **usual)
