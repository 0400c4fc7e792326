"""Scalar heads: one number read from a hidden state, for reward models and for critics.

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    prepare_scalar(model)                                   # packed attention, a float32 head
    packed_scalars(model, batch, last_positions(batch))     # (B,) one reward per completion

    add_critic(policy, critic)                              # its own trunk, or None: the policy's
    scores, values = scores_and_values(policy, batch)       # (S,) each, from one forward

The scalar model stays the family's own sequence classifier, so that it is saved, adapted by LoRA
and loaded by others as such. A critic is a submodule of its policy, so that DDP, DeepSpeed and
the optimizer know one model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput

from posttrain.errors import ConfigError
from posttrain.packed.batch import PackedBatch, pack_groups, upload
from posttrain.packed.forward import computes_rows, packed_inputs
from posttrain.packed.head import TokenScores, requesting_scores, taking_states
from posttrain.packed.prepare import prepare
from posttrain.packed.rows import trunk_states
from posttrain.run.engine import is_set

SEPARATOR_FILE = "steps.json"  # of a process reward model's folder: what is between two steps


class ScalarHead(nn.Linear):
    """A linear layer D -> 1 without bias, in float32 whatever autocast says.

    bfloat16 has 8 significant bits: rewards near 4 would come in steps of 1/64.
    """

    computes_in_float32 = True  # posttrain.packed.half leaves its weight alone

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…, 1)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), self.weight.to(wide))


class _PackedScalar:
    """Mixed into a sequence classifier's class: reads the positions it is asked for."""

    # The class itself is changed, not wrapped, so that `save_pretrained`, PEFT and the engines go
    # on seeing the family's own classifier.
    def forward(self, *arguments: Any, positions: Tensor | None = None, **inputs: Any) -> Any:
        """Plain without `positions`; with them (1, S, 1) numbers, one for each."""
        if positions is None:
            return super().forward(*arguments, **inputs)
        hidden = trunk_states(self, **inputs)[:, positions]  # (1, N, D) -> (1, S, D)
        return SequenceClassifierOutput(logits=self.score(hidden))


class _ActorCritic:
    """Mixed into a causal LM's class: returns values beside the scores, on request."""

    def forward(
        self,
        *arguments: Any,
        with_values: bool = False,
        logits_to_keep: int | Tensor = 0,
        **inputs: Any,
    ) -> Any:
        """Plain without `with_values`; with it (1, S, 4): three scores and the value."""
        if not with_values:
            return super().forward(*arguments, logits_to_keep=logits_to_keep, **inputs)
        hidden = self._states(*arguments, logits_to_keep=logits_to_keep, **inputs)
        if isinstance(self.critic, ScalarHead):
            values = self.critic(hidden)
        else:
            values = self.critic(positions=logits_to_keep, **inputs).logits
        scores = self.get_output_embeddings()(hidden)
        return CausalLMOutput(
            logits=torch.cat((scores, values), -1)
        )  # (1, S, 3) and (1, S, 1) -> (1, S, 4)

    def _states(self, *arguments: Any, logits_to_keep: Tensor, **inputs: Any) -> Tensor:
        """(1, S, D) states that the head gets at these positions."""
        if _calls_head_once():
            return self.base_model(**inputs).last_hidden_state[:, logits_to_keep]
        states: list[Tensor] = []
        with taking_states(into=states):
            super().forward(*arguments, logits_to_keep=logits_to_keep, **inputs)
        found = states[-1]
        return found if found.shape[1] == len(logits_to_keep) else found[:, logits_to_keep]


@cache
def _mixed(mixin: type, family: type) -> type:
    """The class `family` with the mixin's forward, under the same name as saved files know it."""
    return type(family.__name__, (mixin, family), {"__module__": family.__module__})


def prepare_scalar(
    model: nn.Module,
    *,
    attn_implementation: str = "auto",
    device: torch.device | None = None,
    half: bool = False,
) -> str:
    """Give a sequence classifier with one label packed attention and a ScalarHead. Idempotent.

    Arguments, result and refusals are those of posttrain.packed.forward, which sees the trunk as
    part of a causal LM.
    """
    name = type(model).__name__
    if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.out_features != 1:
        raise ConfigError(
            f"{name}: expected a sequence classifier with one label, as "
            "AutoModelForSequenceClassification.from_pretrained(…, num_labels=1) gives; found "
            f"{getattr(model, 'score', 'no layer called score')}."
        )
    shell = _as_causal_lm(model)
    kernel = prepare(shell, attn_implementation=attn_implementation, device=device, half=half)
    if computes_rows(shell):
        model.rows_padded = shell.rows_padded
    if not isinstance(model, _PackedScalar):
        head = ScalarHead(model.score.in_features)
        head.weight = model.score.weight
        model.score = head
        model.__class__ = _mixed(_PackedScalar, type(model))
    return kernel


def _as_causal_lm(model: nn.Module) -> nn.Module:
    """A causal LM around the model's trunk and config, its LM head tied to the embeddings."""
    with torch.device("meta"):
        shell = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)](model.config)
        head = nn.Linear(1, 1, bias=False)
    embeddings = model.get_input_embeddings().weight
    head.out_features, head.in_features = embeddings.shape
    head.weight = embeddings
    setattr(shell, shell.base_model_prefix, model.base_model)
    shell.set_output_embeddings(head)
    return shell.train(model.training)


def has_scalar_head(model: nn.Module) -> bool:
    """True if `prepare_scalar` has been called on this (PEFT-wrapped or bare) model."""
    return any(isinstance(module, ScalarHead) for module in model.modules())


def last_positions(batch: PackedBatch) -> Int[Tensor, " B"]:
    """Packed position of each completion's last token, in the order of the batch's rows."""
    return batch.child_ends


def completion_positions(batch: PackedBatch, ends: Sequence[Sequence[int]]) -> Int[Tensor, " S"]:
    """Packed positions of the tokens with these indices of each completion, in the rows' order."""
    layout = batch.layout
    segments = zip(layout.starts, layout.parents, strict=True)
    starts = [start for start, parent in segments if parent >= 0]
    places = [start + end for start, row in zip(starts, ends, strict=True) for end in row]
    return upload([places], dtype=torch.long, device=layout.device)[0]


def packed_scalars(
    model: nn.Module, batch: PackedBatch, positions: Int[Tensor, " S"]
) -> Float[Tensor, " S"]:
    """Run one forward of a packed batch and return the head's number at each packed position.

    `model` is a sequence classifier that `prepare_scalar` has made ready, bare or wrapped.
    """
    return model(**packed_inputs(batch), positions=positions).logits[0, :, 0]


def zero_heads(model: nn.Module) -> None:
    """Set the weight of every ScalarHead in `model` to 0, so that a new critic predicts 0."""
    for module in model.modules():
        if isinstance(module, ScalarHead):
            nn.init.zeros_(module.weight)


def _calls_head_once() -> bool:
    """True under FSDP, which gathers a head's weight for one call in each forward."""
    return is_set(os.environ, "ACCELERATE_USE_FSDP")


@torch.no_grad()
def _check_trunk(actor: nn.Module) -> None:
    """Refuse a policy whose head gets something else than its trunk's last states."""
    batch = pack_groups([[3, 5]], [[[7, 9]]], device=next(actor.parameters()).device)
    inputs, states = packed_inputs(batch), []
    with taking_states(into=states):
        actor(**inputs, logits_to_keep=batch.predictors)
    found = getattr(actor.base_model(**inputs), "last_hidden_state", None)
    if found is None or not torch.equal(found[:, batch.predictors], states[-1]):
        raise ConfigError(
            f"PPO under FSDP: the head of {type(actor).__name__} gets something else than the last "
            "states of its trunk. Use accelerate_configs/zero3.yaml."
        )


def add_critic(policy: nn.Module, critic: nn.Module | None) -> None:
    """Make `critic` part of `policy` (a prepared causal LM, bare or PEFT), its head set to 0.

    critic: a sequence classifier with a trunk of its own, or None for a head on the policy's
    trunk.
    """
    actor = _bare(policy)
    if critic is None:
        embeddings = actor.get_input_embeddings().weight
        critic = ScalarHead(embeddings.shape[1]).to(embeddings.device)
    elif not has_scalar_head(critic):
        prepare_scalar(critic)
    zero_heads(critic)
    if _calls_head_once() and not computes_rows(actor):
        _check_trunk(actor)
    actor.__class__ = _mixed(_ActorCritic, type(actor))
    actor.critic = critic


def critic_of(policy: nn.Module) -> nn.Module:
    """Return the critic that `add_critic` made part of this policy."""
    return _bare(policy).critic


@contextmanager
def without_critic(policy: nn.Module) -> Iterator[None]:
    """Take the critic out of its policy for a while, to save, load or copy the policy alone."""
    actor = _bare(policy)
    critic = actor._modules.pop("critic")
    try:
        yield
    finally:
        actor.critic = critic


def scores_and_values(
    policy: nn.Module, batch: PackedBatch, **wanted: float | bool
) -> tuple[TokenScores, Float[Tensor, " S"]]:
    """Run one forward for both the scores of `packed_logps` and the critic's values.

    A value belongs to the state before its token: it is read where the token is predicted.
    wanted: the keywords of packed_logps.
    """
    with requesting_scores(batch, **wanted):
        output = policy(**packed_inputs(batch), logits_to_keep=batch.predictors, with_values=True)
    *scores, values = output.logits[0].unbind(-1)
    return TokenScores(*scores), values


def _bare(policy: nn.Module) -> nn.Module:
    """The causal LM itself, below LoRA."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy
