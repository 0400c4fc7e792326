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
    """Rows that are computed together: r of them, padded on the right to L tokens."""

    tokens: Tensor  # (r, L) packed positions; 0 where there is padding
    mask: Tensor  # (r, L) 1 where there is a token
    new: Tensor  # (n,) places in the flat (r * L) of packed tokens that no earlier row has
    images: list[list]  # those of each row, see posttrain.packed.vision


@dataclass(frozen=True)
class _Plan:
    parts: list[Part]
    order: Tensor  # (N,) where the state of packed token n lies among those of all parts


def rows_plan(layout: Layout, fill: float) -> _Plan:
    """Cut the paths of a packed batch into rows; see FILL."""
    is_parent = set(layout.parents)
    leaves = [i for i in range(len(layout.starts)) if i not in is_parent]
    paths = [torch.cat([torch.arange(*r) for r in layout.key_ranges(i)]) for i in leaves]
    order = sorted(range(len(paths)), key=lambda i: -len(paths[i]))
    images = [_images_of(layout, leaf) if layout.images else [] for leaf in leaves]
    groups: list[list[int]] = []
    for i in order:
        longest = len(paths[groups[-1][0]]) if groups else 0
        shortest = longest if fill == 1 else fill * longest - SLACK
        if groups and len(paths[i]) >= shortest:
            groups[-1].append(i)
        else:
            groups.append([i])
    seen = torch.zeros(sum(layout.lengths), dtype=torch.bool)
    found, parts = [], []
    for rows in groups:
        group = [paths[i] for i in rows]
        longest, places = len(group[0]), []
        tokens = nn.utils.rnn.pad_sequence(group, batch_first=True)
        lengths = torch.tensor([len(path) for path in group])
        for row, path in enumerate(group):
            new = (~seen[path]).nonzero().squeeze(1)
            seen[path] = True
            found.append(path[new])
            places.append(new + row * longest)
        mask = torch.arange(longest) < lengths[:, None]
        parts.append((tokens, mask, torch.cat(places)))
    order = torch.cat(found).argsort()
    flat = [x.flatten() for part in parts for x in part]
    *flat, order = upload([*flat, order], dtype=torch.long, device=layout.device)
    triples = zip(flat[::3], flat[1::3], flat[2::3], parts, groups, strict=True)
    parts = [
        Part(tokens.view_as(part[0]), mask.view_as(part[0]), new, [images[i] for i in rows])
        for tokens, mask, new, part, rows in triples
    ]
    return _Plan(parts, order)


def _images_of(layout: Layout, segment: int) -> list:
    """The images on the path from the root to a segment, in order."""
    found: list = []
    while segment >= 0:
        found = [*layout.images.get(segment, ()), *found]
        segment = layout.parents[segment]
    return found


def plan_for(model: nn.Module, layout: Layout) -> _Plan:
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
