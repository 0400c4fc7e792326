"""Recurrent layers that compute a shared prompt once, and hand its state to each completion."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from benchmarks.families import tiny_model
from posttrain.packed.batch import Segment, pack
from posttrain.packed.forward import packed_logps
from posttrain.packed.mixers import mix_by_rows, recurrent_mixers
from posttrain.packed.prepare import prepare
from posttrain.packed.states import State

SERVED = {
    "qwen3_5_text": {},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2_moe": {"conv_bias": True},
    "bamba": {"mamba_proj_bias": True},
    "falcon_h1": {},
    "nemotron_h": {"use_bias": True, "mamba_proj_bias": True},
    "granitemoehybrid": {},
}
# Lengths of segments and their parents: two prompts that share a call, one of them shorter than a
# convolution, with three completions each, and a text without a prompt.
LENGTHS, PARENTS = (9, 5, 2, 21, 2, 3, 7, 4, 6), (None, 0, 0, 0, None, 4, 4, 4, None)
DEEPER = (4, 3, 1, 2, 5, 6, 1), (None, 0, 1, 1, 0, 2, 2)


def made(family, **changes):
    """A tiny model with no weight that is zero, as biases are before training."""
    model = tiny_model(family, **changes)
    dice = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.1, generator=dice)
    return model


def batch_of(lengths, parents):
    """Each segment is a row whose tokens are scored, but for those of prompts and first ones."""
    dice = torch.Generator().manual_seed(0)
    segments = []
    for row, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        ids = torch.randint(3, 300, (length,), generator=dice).tolist()
        scored = [row not in parents] * length
        scored[0] &= parent is not None
        segments.append(Segment(ids, parent, scored, row))
    return segments, pack(segments, num_rows=len(segments), device="cpu")


def logps_of_paths(model, segments):
    """Log-probs of the scored tokens, each leaf in a forward of its whole path."""
    found = []
    for segment in segments:
        if not any(segment.scored):
            continue
        ids, parent = list(segment.token_ids), segment.parent
        while parent is not None:
            ids, parent = [*segments[parent].token_ids, *ids], segments[parent].parent
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        found.append(logps[-sum(segment.scored) :])
    return torch.cat(found)


def gradients(model, logps):
    (logps * torch.arange(len(logps)).cos()).sum().backward()
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in model.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


def gap(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def tokens_seen(model):
    """Numbers of tokens, padding left out, in each call of the first layer's first product."""
    mixer, seen = model.base_model.mixers[0], []
    product = next(module for module in mixer.modules() if isinstance(module, nn.Linear))
    product.register_forward_pre_hook(lambda _m, given: seen.append(int(given[0].any(-1).sum())))
    return seen


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("tree", [(LENGTHS, PARENTS), DEEPER], ids=["groups", "deeper"])
def test_log_probs_and_gradients_are_those_of_each_sequence_alone(family, tree):
    plain, model = (made(family, **SERVED[family]) for _ in range(2))
    prepare(model)
    assert all(mixer.cache_name for mixer in model.base_model.mixers)
    segments, batch = batch_of(*tree)
    wanted, found = logps_of_paths(plain, segments), packed_logps(model, batch).logps
    assert gap(found.detach(), wanted.detach()) < 1e-5
    assert gap(gradients(model, found), gradients(plain, wanted)) < 1e-5


@pytest.mark.parametrize("family", SERVED)
def test_each_token_of_a_shared_prompt_is_computed_once(family):
    model = made(family, **SERVED[family])
    prepare(model)
    seen = tokens_seen(model)
    packed_logps(model, batch_of(LENGTHS, PARENTS)[1])
    assert sum(seen) == sum(LENGTHS)


@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h"])
def test_completions_of_one_token_are_no_steps_of_generation(family):
    """Which write into states, and have no gradient in some kernels."""
    plain, model = made(family), made(family)
    prepare(model)
    segments, batch = batch_of((5, 1, 1), (None, 0, 0))
    mixer, seen = model.base_model.mixers[0], []
    product = next(module for module in mixer.modules() if isinstance(module, nn.Linear))
    product.register_forward_pre_hook(lambda _m, given: seen.append(given[0].shape[1]))
    found = packed_logps(model, batch).logps
    assert seen == [5, 2]
    assert gap(found, logps_of_paths(plain, segments)) < 1e-5


def test_a_layer_that_ignores_a_state_runs_by_whole_rows(capsys):
    """Mamba's first scan, in Jamba and Zamba, begins with none."""
    model = made("jamba")
    prepare(model)
    assert "layers run by rows, all else packed: JambaMambaMixer" in capsys.readouterr().out
    seen = tokens_seen(model)
    packed_logps(model, batch_of(LENGTHS, PARENTS)[1])
    assert sum(seen) == sum(LENGTHS) + 2 * (LENGTHS[0] + LENGTHS[4])


class Sums(nn.Module):
    """A layer whose outputs are sums over the tokens so far, or that only keeps these."""

    def __init__(self, *, biased=False, reads=True):
        super().__init__()
        self.product, self.reads = nn.Linear(8, 8, biased), reads
        if biased:
            nn.init.zeros_(self.product.bias)

    def forward(self, inputs, cache_params=None, attention_mask=None):
        kept = attention_mask is None or attention_mask[..., None]
        products = self.product(inputs * kept)
        sums = products.cumsum(1)
        if cache_params is not None and self.reads:
            before = cache_params.get_recurrent_state(0)
            sums = sums if before is None else sums + before[:, None]
        if cache_params is not None:
            cache_params.update_recurrent_state(sums[:, -1], 0)
        return sums if self.reads else products


SUMS = [
    ({}, "cache_params"),
    ({"reads": False}, None),
    ({"biased": True}, None),  # once it is trained, padding would count
]


@pytest.mark.parametrize(("settings", "name"), SUMS)
def test_a_layer_is_tried_before_it_is_trusted(settings, name):
    model = nn.Module()
    model.config = PreTrainedConfig(hidden_size=8)
    model.base_model, layer = nn.Identity(), Sums(**settings)
    mix_by_rows(model, [layer])
    assert layer.cache_name == name
    assert layer.product.bias is None or not layer.product.bias.any()


WRONG = {
    "without its gradient": lambda state, rows: State(state.conv[rows].detach()),
    "of another prompt": lambda state, rows: State(state.conv[rows.flip(0)]),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_state_that_is_not_handed_on_exactly_is_noticed(how, monkeypatch):
    monkeypatch.setattr(State, "of", WRONG[how])
    model = made("lfm2_moe")
    mix_by_rows(model, recurrent_mixers(model))
    assert not any(mixer.cache_name for mixer in model.base_model.mixers)


def test_ranks_of_a_sharded_model_make_one_call_each(monkeypatch):
    model = made("qwen3_5_text")
    prepare(model)
    batch = batch_of(LENGTHS, PARENTS)[1]
    wanted, seen = packed_logps(model, batch).logps, tokens_seen(model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = packed_logps(model, batch_of(LENGTHS, PARENTS)[1]).logps
    assert len(seen) == 1
    assert torch.allclose(found, wanted, atol=1e-5)
