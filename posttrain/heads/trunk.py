"""Take from a model's forward what heads need: its states, and how it calls a layer.

    states, call = run_trunk(forward, inputs, layer=layer)     # inside the model's forward
    Trunk(model, states, call).base_scores(ahead)              # by its LM head, in chunks

A transformer block of a head attends as the model's layers do: within segments, by the same kernel,
at the same positions. All of that comes with the arguments of a layer of the model, which are
taken down as the forward passes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.heads.ahead import Ahead
from posttrain.packed.head import ScoringHead, requesting_scores, taking_states

# How families call the norm after the last layer.
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@dataclass
class Call:
    """The arguments of one layer in a forward: (1, N, D) states that it got, and all else."""

    states: Tensor | None = None
    more: tuple = ()
    named: dict[str, Any] = field(default_factory=dict)

    def of(self, layer: nn.Module, states: Tensor) -> Tensor:
        """Call another layer as this one was called, with other states."""
        found = layer(states, *self.more, **self.named)
        return found[0] if isinstance(found, tuple) else found


@dataclass
class Trunk:
    """A model after its forward of a packed batch.

    states: (1, N, D) as the LM head gets them. call: of the watched layer. following: for each
    depth the (N,) ids that follow each token. detach: heads have no gradient in the model's weights
    that they share.
    """

    model: nn.Module
    states: Tensor
    call: Call
    following: Sequence[Tensor] = ()
    detach: bool = False

    def base_scores(self, ahead: Ahead) -> Tensor:
        """(1, S, 3) scores by the model's LM head of tokens that its states predict."""
        states = self.states[:, ahead.positions]
        lm_head = self.shared(self.model.get_output_embeddings())
        return chunked_scores(lm_head, states, ahead.targets, equal_slopes=True)

    def shared(self, module: nn.Module) -> nn.Module:
        """Return a layer of the model for its heads to use, with `detach` one without gradient."""
        if not self.detach:
            return module
        frozen = copy.copy(module)
        frozen._parameters = {
            name: weight if weight is None else weight.detach()
            for name, weight in module._parameters.items()
        }
        return frozen


def chunked_scores(
    lm_head: ScoringHead,
    states: Tensor,
    targets: Tensor,
    *,
    equal_slopes: bool,
    temperature: float = 1.0,
) -> Tensor:
    """(1, S, D) states, (S,) targets -> (1, S, 3) scores, without all the logits.

    equal_slopes, temperature: see posttrain.packed.head.chunked_logps.
    """
    wanted = {"with_entropy": True, "entropy_gradient": False, "equal_slopes": equal_slopes}
    wanted["temperature"] = temperature
    with requesting_scores(SimpleNamespace(targets=targets), **wanted):
        return lm_head(states)


def run_trunk(
    forward: Callable[..., Any], inputs: Mapping[str, Any], *, layer: nn.Module | None = None
) -> tuple[Tensor, Call]:
    """Run `forward` on a packed batch; return (1, N, D) states and how `layer` was called."""
    call, states = Call(), []

    def note(_module: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        arguments = list(arguments)
        call.named = dict(named)
        call.states = arguments.pop(0) if arguments else call.named.pop("hidden_states")
        call.more = tuple(arguments)

    hook = layer and layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with taking_states(into=states):
            forward(**inputs, logits_to_keep=slice(None))
    finally:
        if hook:
            hook.remove()
    return states[-1], call


def bare(model: nn.Module) -> nn.Module:
    """Return the causal LM itself, below LoRA."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attention_layer(model: nn.Module) -> tuple[int, nn.Module]:
    """Return the last layer of a causal LM that attends to all tokens before, and its index.

    Raises ConfigError for a model without such layers.
    """
    layers = getattr(bare(model).base_model, "layers", None)
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    if isinstance(layers, nn.ModuleList):
        for index in reversed(range(len(layers))):
            if kinds is None or kinds[index] == "full_attention":
                return index, layers[index]
    raise ConfigError(
        f"{type(bare(model)).__name__}: expected decoder layers with full attention, to make "
        "prediction modules of their class; found none. Medusa heads need no such layer."
    )


def final_norm(model: nn.Module) -> nn.Module:
    """Return the norm between the last layer and the LM head; ConfigError where none is found."""
    for name in FINAL_NORMS:
        if isinstance(found := getattr(bare(model).base_model, name, None), nn.Module):
            return found
    raise ConfigError(
        f"{type(bare(model)).__name__}: expected a norm after the last layer, called "
        f"{', '.join(FINAL_NORMS)}; found none. Medusa heads need none."
    )


def new_norm(like: nn.Module, *, copied: bool) -> nn.Module:
    """Make a norm of the same class, as that class starts, or with the values of `like`."""
    eps = getattr(like, "variance_epsilon", getattr(like, "eps", 1e-6))
    weight = next(like.parameters())
    new = type(like)(weight.shape[0], eps).to(weight.device)
    if copied:
        new.load_state_dict(like.state_dict())
    return new.float()


def new_layer(model: nn.Module) -> nn.Module:
    """Make a layer of the class of the model's last attention layer, with that layer's values."""
    index, layer = attention_layer(model)
    with torch.device(next(layer.parameters()).device):
        new = type(layer)(layer_config(layer, model), index)
    new.load_state_dict({k.replace(".base_layer", ""): v for k, v in _own(layer).items()})
    return new.float().requires_grad_(True).train(layer.training)


def layer_config(layer: nn.Module, model: nn.Module) -> Any:
    """Return the config that the model's layers were made from."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    return next((c for c in configs if c is not None), bare(model).config.get_text_config())


def _own(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's weights without those of an adapter."""
    return {k: v for k, v in layer.state_dict().items() if "lora_" not in k}
