"""Recurrent layers that compute a shared prompt once, and hand its state to each completion.

    name = cache_name(mixer, width)             # by posttrain.packed.mixers
    outputs, *_ = hand_on(call, layout, name)

What such a layer knows of the tokens before is a state and the last inputs of its convolution. In
transformers it reads both from a cache and leaves them there. Ours keeps them in the graph, so that
the gradients of completions reach their prompt.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from posttrain.packed.batch import Layout, Segment, pack, upload
from posttrain.packed.forward import attempted
from posttrain.packed.kernels import plan_of
from posttrain.packed.rows import FILL, Plan, make_plan, similar

CACHES = ("cache_params", "past_key_values")  # the names that layers have for their cache
# Relative differences that sums in another order make in a layer's outputs and gradients.
TOLERANCE, TOLERANCE_HALF = 1e-3, 0.05
# Segments that a layer is tried on: prompts and completions of several lengths, and a document.
LENGTHS, PARENTS = (3, 4, 2, 6, 1, 5), (None, 0, 0, None, 3, None)


@dataclass
class State:
    """The states of r sequences in one layer, with those methods of a cache that layers call.

    conv: (r, C, K) the last inputs of the convolution. recurrent: (r, ...). None before any token.
    mask: (r, L) 1 where there is a token, if these are the first and padded on the left.
    """

    conv: Tensor | None = None
    recurrent: Tensor | None = None
    mask: Tensor | None = None

    def get_conv_state(self, _layer: int, **_one: int) -> Tensor | None:
        """Return the inputs of the convolution before the first token."""
        return self.conv

    def get_recurrent_state(self, _layer: int, **_one: int) -> Tensor | None:
        """Return the state before the first token."""
        return self.recurrent

    def update_conv_state(self, inputs: Tensor, _layer: int, *, conv_kernel_size: int) -> Tensor:
        """Return (r, C, K + L) inputs with those before them, and keep the last K."""
        if self.conv is not None:
            inputs = torch.cat([self.conv, inputs], -1)
        elif self.mask is not None and len(inputs) > 1:
            inputs = inputs * self.mask[:, None]  # else a bias would be read as earlier tokens
        missing = max(conv_kernel_size - inputs.shape[-1], 0)
        self.conv = nn.functional.pad(inputs, (missing, 0))[..., -conv_kernel_size:]
        return inputs

    def update_recurrent_state(self, state: Tensor, *_layer: int, **_named: int) -> None:
        """Keep the state after the last token."""
        self.recurrent = state

    def of(self, rows: Tensor) -> State:
        """Return the states of these rows, (r,)."""
        both = (self.conv, self.recurrent)
        return State(*(None if kept is None else kept[rows] for kept in both))


@dataclass(frozen=True)
class _Plan:
    """Rows of the roots, then those of what follows them on the way to each leaf."""

    rows: Plan
    num_first: int  # parts of roots
    roots: list[Tensor]  # for each part after them, (r,) rows of all roots that it continues


def _states_plan(layout: Layout) -> _Plan:
    # Padding before the first token leaves the state at zero; behind it, it would change it. Rows
    # that continue one are padded behind, where nothing reads on, to two tokens at least: one token
    # would be a step of generation, for which some kernels have no gradient.
    is_parent = set(layout.parents)
    firsts, rests, root_of = [], [], {}
    for leaf, parent in enumerate(layout.parents):
        first, *rest = [torch.arange(*each) for each in layout.key_ranges(leaf)]
        if parent < 0:
            firsts.append(first)
        elif leaf not in is_parent:
            rests.append(torch.cat(rest))
            root_of[rests[-1][0].item()] = first[0].item()
    first, rest = similar(firsts, FILL), similar(rests, FILL)
    rows = {path[0].item(): row for row, path in enumerate(chain(*first))}
    roots = [[rows[root_of[path[0].item()]] for path in group] for group in rest]
    roots = upload(roots, dtype=torch.long, device=layout.device)
    return _Plan(make_plan(first + rest, layout, len(first)), len(first), list(roots))


def hand_on(call: Callable[..., tuple], layout: Layout, name: str) -> tuple:
    """Return (1, N, D) outputs of a layer on a packed batch, and what else its last call gave.

    call: from a part, and a State under the keyword `name`, to (r, L, D) outputs and what else.
    """
    plan = plan_of(layout, _states_plan)
    states, outputs, more = [], [], ()
    for part in plan.rows.parts[: plan.num_first]:
        states.append(State(mask=part.mask))
        found, *more = call(part, **{name: states[-1]})
        outputs.append(found.flatten(0, 1)[part.new])
    ends = State(
        _joined([state.conv for state in states]), _joined([state.recurrent for state in states])
    )
    for part, roots in zip(plan.rows.parts[plan.num_first :], plan.roots, strict=True):
        found, *more = call(part, **{name: ends.of(roots)})
        outputs.append(found.flatten(0, 1)[part.new])
    return torch.cat(outputs)[plan.rows.order][None], *more


def _joined(states: list[Tensor | None]) -> Tensor | None:
    return None if states[0] is None else torch.cat(states)


def cache_name(mixer: nn.Module, width: int | None) -> str | None:
    """Return the name of a layer's cache if it goes on exactly from a State in it, else None.

    Tried on a copy with (1, N, width) random inputs: its outputs and gradients must be those of
    whole rows, and depend on all that a state holds. mixer: has a forward by rows, see
    posttrain.packed.mixers.
    """
    name = next((n for n in CACHES if n in inspect.signature(mixer.forward).parameters), None)
    weight = next(mixer.parameters())
    if not name or not width or weight.is_meta or hasattr(weight, "ds_id"):
        return None
    with torch.enable_grad():
        goes_on, _raised = attempted(lambda: _goes_on(copy.deepcopy(mixer).eval(), name, width))
    return name if goes_on else None


def _goes_on(mixer: nn.Module, name: str, width: int) -> bool:
    weight = max(filter(Tensor.is_floating_point, mixer.parameters()), key=Tensor.numel)
    dice = torch.Generator(weight.device).manual_seed(0)
    with torch.no_grad():
        for each in mixer.parameters():
            if each.is_floating_point() and not each.any():  # what is zero now may be trained
                each.normal_(std=0.1, generator=dice)
    drawn = torch.randn(2, 1, sum(LENGTHS), width, generator=dice, device=weight.device)
    inputs, slopes = drawn.to(weight.dtype)
    if not _reads_all(mixer, name, inputs):
        return False
    segments = [Segment([0] * n, parent) for n, parent in zip(LENGTHS, PARENTS, strict=True)]
    mixer.layout, found = pack(segments, num_rows=0, device=weight.device).layout, []
    for mixer.cache_name in (None, name):
        leaf = inputs.clone().requires_grad_()
        outputs = mixer(leaf)
        found.append((outputs.detach(), *torch.autograd.grad((outputs * slopes).sum(), leaf)))
    tolerance = TOLERANCE_HALF if weight.element_size() < 4 else TOLERANCE
    gaps = ((ours - whole).norm() / whole.norm() for whole, ours in zip(*found, strict=True))
    return all(gap <= tolerance for gap in gaps)


def _reads_all(mixer: nn.Module, name: str, inputs: Tensor) -> bool:
    """Return True if what is wrong in a state shows in the outputs after it."""
    state = State()
    mixer(inputs[:, :9], **{name: state})
    held = {kind: kept for kind, kept in vars(state).items() if kept is not None}
    for kind, kept in held.items():
        spoilt = State(**(held | {kind: torch.full_like(kept, torch.nan)}))
        if not mixer(inputs[:, 9:], **{name: spoilt}).isnan().any():
            return False
    return bool(held)
