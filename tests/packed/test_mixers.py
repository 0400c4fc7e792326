"""Layers that run by rows in a packed model: recurrence, convolutions, attention of their own."""

import copy

import pytest
import torch

from benchmarks.families import tiny_model
from posttrain.models.load import make_trainable
from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import computes_rows, packed_logps
from posttrain.packed.mixers import mix_by_rows, recurrent_mixers, undo_mixers
from posttrain.packed.prepare import prepare
from posttrain.rollouts.generator import HFGenerator, way_to_generate
from posttrain.rollouts.sampling import Sampling
from posttrain.run.settings import ModelConfig
from tests.conftest import logps_alone
from tests.trainers.tiny import arguments, dpo_trainer, logged, rl_trainer, sft_trainer

PROMPT, ANSWERS = [5, 6, 7, 8, 9, 10], [[11, 12], [13, 14, 15, 16], [17]]
FAMILIES = ["qwen3_5_text", "lfm2_moe", "nemotron_h", "granitemoehybrid", "stablelm"]


def batch_of(prompt=PROMPT, answers=ANSWERS):
    return pack_groups([prompt], [answers], device=torch.device("cpu"))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_is_computed_once_wherever_a_token_is_looked_at_alone(family):
    model = tiny_model(family)
    assert prepare(model) == "sdpa"
    seen = []
    layer = model.base_model.layers[-1]
    layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[1]))
    packed_logps(model, batch_of())
    assert seen[0] == len(PROMPT) + sum(map(len, ANSWERS))


@pytest.mark.parametrize("family", ["qwen3_5_text", "stablelm"])
def test_a_layer_that_is_run_again_in_the_backward_sees_the_same_rows(family):
    """Activation checkpoints call layers outside any forward of the model."""
    model = tiny_model(family)
    prepare(model)
    model.train()
    plain = gradients(model, packed_logps(model, batch_of()).logps.sum())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, packed_logps(model, batch_of()).logps.sum())
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, again[name], rtol=1e-4, atol=1e-6), name


def test_without_its_rows_a_recurrence_runs_on_into_the_next_text():
    """The negative control: what the rows are there for."""
    model = tiny_model("qwen3_5_text")
    prepare(model)
    right = packed_logps(model, batch_of()).logps
    undo_mixers(model)
    assert (packed_logps(model, batch_of()).logps - right).abs().max() > 0.1
    mix_by_rows(model, recurrent_mixers(model))
    assert torch.equal(packed_logps(model, batch_of()).logps, right)


def test_a_copy_has_rows_of_its_own():
    model = tiny_model("qwen3_5_text")
    prepare(model)
    other = copy.deepcopy(model)
    expected = packed_logps(model, batch_of()).logps
    packed_logps(model, batch_of([5, 6], [[7]]))  # the copy is not told of this layout
    assert torch.equal(packed_logps(other, batch_of()).logps, expected)


@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h"])
def test_below_an_adapter_the_layers_know_the_layout_too(family):
    config = ModelConfig(model_name_or_path="tiny", use_peft=True, lora_r=4, dtype="float32")
    model = make_trainable(tiny_model(family), config, quiet=True)
    assert not computes_rows(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += 0.1
    packed = packed_logps(model, batch_of()).logps
    assert torch.allclose(packed, logps_alone(model, PROMPT, ANSWERS), atol=1e-5)


def test_a_model_is_made_ready_twice(capsys):
    """As a reward model on it is: its trunk is prepared with the LM, then with its new head."""
    model = tiny_model("qwen3_5_text")
    prepare(model)
    expected = packed_logps(model, batch_of()).logps
    assert prepare(model) == "sdpa"
    assert torch.equal(packed_logps(model, batch_of()).logps, expected)
    assert "rows    each" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", [sft_trainer, dpo_trainer, rl_trainer])
def test_trainers_take_the_steps_that_they_take_by_rows(kind, tmp_path):
    seen = {}
    for how in ("auto", "rows"):
        model = tiny_model("qwen3_5_text")
        prepare(model, attn_implementation=how)
        trainer = kind(model, arguments(tmp_path / how))
        trainer.train()
        seen[how] = [logged(trainer, name) for name in ("loss", "grad_norm")]
        assert computes_rows(model) == (how == "rows")
    for ours, theirs in zip(seen["auto"], seen["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6)


def test_sampling_goes_through_the_models_own_cache(capsys):
    model = tiny_model("qwen3_5_text")
    prepare(model)
    assert way_to_generate(model) == "cache"
    assert "mixers  1 layers hand a prompt's state" in capsys.readouterr().out
    (completions,) = HFGenerator(model).generate([PROMPT], Sampling(5, ()), 2)
    batch = batch_of(PROMPT, [completion.token_ids for completion in completions])
    sampled = torch.tensor([logp for completion in completions for logp in completion.logps])
    assert torch.allclose(packed_logps(model, batch).logps, sampled, atol=1e-5)
