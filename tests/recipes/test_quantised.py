"""QLoRA: the same results in every mode, trained, resumed, merged and read again."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb

from posttrain.errors import ConfigError
from posttrain.models.load import load_model, load_tokenizer
from posttrain.models.quantised import Frozen4bit, Frozen8bit
from posttrain.models.reward_model import load_reward_model
from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.run.options import load
from posttrain.run.settings import ModelConfig, check_trainer_keys
from recipes import dpo, grpo, sft
from tests.conftest import make_model, make_tokenizer
from tests.recipes.conftest import run

FORMATS = ("nf4", "int8")
KINDS = {"nf4": Frozen4bit, "int8": Frozen8bit}
TINY = {"dtype": "float32", "use_peft": True, "lora_r": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of two layers, pairs, texts and problems."""
    folder = tmp_path_factory.mktemp("quantised")
    make_model(num_hidden_layers=2).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = {
        "sft": {"prompt": "5 6 7", "completion": "8 9"},
        "dpo": {"prompt": "5 6 7", "chosen": "8 9", "rejected": "10 11 12"},
        "grpo": {"question": "5 6 7", "answer": "8"},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 16)
    (folder / "mine.py").write_text(
        "def many(completions, **_): return [float(len(text)) for text in completions]\n"
    )
    return folder


def loaded(folder: Path, quantization: str, **settings):
    settings = {"use_peft": True, "lora_r": 4, "dtype": "float32", **settings}
    name = str(folder / "model")
    config = ModelConfig(model_name_or_path=name, quantization=quantization, **settings)
    return load_model(config, quiet=True)


def layers(model, quantization):
    return [module for module in model.modules() if isinstance(module, KINDS[quantization])]


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_layer_computes_alike_in_every_mode_and_stands_for_one_weight(folder, quantization):
    model = loaded(folder, quantization)
    assert len(layers(model, quantization)) == 2 * 7
    if quantization == "nf4":  # some processors pack a layer that is in evaluation
        assert all(layer.training for layer in layers(model.eval(), quantization))
    layer = layers(model, quantization)[0]
    inputs = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    inputs[0] *= 50  # a row of outliers is nothing to the other rows
    weight = layer(torch.eye(layer.in_features)).T.detach()
    found = []
    for training in (True, False, True):
        model.train(training)
        with torch.no_grad():
            found.append(layer(inputs))
        found.append(layer(inputs.clone().requires_grad_()).detach())
        found.append(torch.cat([layer(row[None]).detach() for row in inputs]))
    for outputs in found:
        assert torch.allclose(outputs, inputs @ weight.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], found[3])


@pytest.mark.parametrize("quantization", FORMATS)
def test_every_adapter_has_its_gradient_after_an_evaluation(folder, quantization):
    model = loaded(folder, quantization)
    batch = pack_groups([[5, 6, 7]], [[[8, 9], [10, 11]]], device=torch.device("cpu"))
    with torch.no_grad():
        before = packed_logps(model.eval(), batch).logps
    after = packed_logps(model.train(), batch).logps
    assert torch.allclose(before, after, atol=1e-6)
    after.sum().backward()
    assert all(
        weight.grad.abs().max() > 0 for name, weight in model.named_parameters() if "lora_B" in name
    )


@pytest.mark.parametrize("quantization", FORMATS)
def test_the_weights_keep_their_format_in_half_precision_too(folder, quantization):
    model = loaded(folder, quantization, dtype="bfloat16")
    for layer in layers(model, quantization):
        assert layer.weight.dtype in (torch.uint8, torch.int8)
    exact = loaded(folder, quantization)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(input_ids=ids).logits
    gap = (half - exact(input_ids=ids).logits).abs().max()
    assert 0 < gap < 0.02 * half.abs().max()


@pytest.mark.parametrize("quantization", FORMATS)
def test_dora_reads_the_weights_that_the_format_stands_for(folder, quantization):
    model = loaded(folder, quantization, use_dora=True)
    plain = loaded(folder, quantization)
    ids = torch.arange(5, 17)[None]
    assert torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_layer_of_few_bits_cannot_be_trained_whole(folder, quantization):
    with pytest.raises(ConfigError, match=f"q_proj is held in {quantization}"):
        loaded(folder, quantization, lora_modules_to_save=["q_proj"])
    loaded(folder, quantization, lora_modules_to_save=["embed_tokens"])


def test_a_reward_model_takes_no_format(folder):
    name = str(folder / "model")
    config = ModelConfig(model_name_or_path=name, quantization="nf4", use_peft=True)
    with pytest.raises(ConfigError, match="--quantization: a reward model does not take it"):
        load_reward_model(config, load_tokenizer(name))


def settings_of(recipe, folder: Path) -> dict:
    name = recipe.__name__.rpartition(".")[2]
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset": str(folder / f"{name}.jsonl"),
        "per_device_train_batch_size": 4,
        "template": "plain",
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "trainer": {"optim": "adamw_8bit"},
        **TINY,
    }
    if recipe is grpo:
        settings |= {
            "num_generations": 4,
            "max_completion_length": 6,
            "reward": f"{folder / 'mine.py'}:many",
            "reward_workers": 0,
            "warmup_steps": 0,
            "eval_dataset": None,
        }
    return settings


@pytest.mark.parametrize("recipe", [sft, dpo, grpo], ids=["sft", "dpo", "grpo"])
@pytest.mark.parametrize("quantization", FORMATS)
def test_a_resumed_run_is_the_uninterrupted_one(recipe, quantization, folder, tmp_path):
    settings = settings_of(recipe, folder) | {"quantization": quantization}
    whole = run(recipe, tmp_path / "whole", max_steps=4, **settings)
    run(recipe, tmp_path / "parts", max_steps=2, **settings)
    parts = run(recipe, tmp_path / "parts", max_steps=4, resume=True, **settings)
    assert f"frozen weights in {quantization}" in whole.said
    assert type(whole.trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")
    states = [dict(r.trainer.model.named_parameters()) for r in (whole, parts)]
    adapters = [name for name in states[0] if "lora_" in name]
    assert len(adapters) == 2 * 2 * 7
    for name in adapters:
        assert torch.equal(states[0][name], states[1][name]), name
    assert max(states[0][name].abs().max() for name in adapters if "lora_B" in name) > 1e-3
    if recipe is grpo:  # sampling and training see the same policy
        assert max(record["sampler_gap"] for record in whole.metrics) < 1e-5
    if recipe is dpo:
        assert whole.metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert whole.metrics[-1]["loss"] < 0.6


def test_the_adapter_is_merged_into_the_base_as_it_was(folder, tmp_path):
    found = run(sft, tmp_path, max_steps=2, quantization="nf4", **settings_of(sft, folder))
    merged = load_model(ModelConfig(model_name_or_path=found.model), quiet=True)
    base = load_model(ModelConfig(model_name_or_path=str(folder / "model")), quiet=True)
    trained = dict(found.trainer.model.named_parameters())
    name = "model.layers.0.self_attn.q_proj"
    a, b = (trained[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB")
    weight = base.get_parameter(f"{name}.weight") + 8 * b @ a  # alpha 32, rank 4
    assert torch.allclose(merged.get_parameter(f"{name}.weight"), weight, atol=1e-6)
    ids = torch.arange(5, 17)[None]
    pairs = [(merged, found.trainer.model), (base, loaded(folder, "nf4"))]
    with torch.no_grad():
        trained, fresh = (
            (a(input_ids=ids).logits - b(input_ids=ids).logits).norm() for a, b in pairs
        )
    assert trained < 1.5 * fresh  # what the 4 bits leave out, and no more


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--quantization", "nf4"], "--quantization: expected --use_peft"),
        (["--use_dora"], "--use_dora: expected --use_peft"),
        (["--quantization", "nf5", "--use_peft"], "--quantization: expected .*nf4"),
    ],
)
def test_settings_that_cannot_act_are_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        load(sft.Config, flags)


def test_a_package_that_is_missing_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "bitsandbytes" else find(n)
    )
    remedy = r"pip install 'posttrain\[bitsandbytes\]'"
    with pytest.raises(ConfigError, match=f"--quantization: .*{remedy}"):
        load(sft.Config, ["--quantization", "nf4", "--use_peft"])
    with pytest.raises(ConfigError, match=f"trainer.optim: .*{remedy}"):
        check_trainer_keys({"optim": "paged_adamw_8bit"}, own=())


def test_an_adapter_cannot_be_read_in_few_bits(folder, tmp_path):
    found = run(sft, tmp_path, max_steps=1, **settings_of(sft, folder))
    config = ModelConfig(model_name_or_path=found.model, use_peft=True, quantization="int8")
    with pytest.raises(ConfigError, match=r"found the adapter .*posttrain merge"):
        load_model(config)


def test_the_control_bitsandbytes_own_layers_compute_otherwise_in_evaluation():
    """The guards above guard against something: without them int8 layers round their inputs."""
    own = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=0.0)
    own.load_state_dict({"weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))})
    own.to("cpu")
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (own.train()(inputs) - own.eval()(inputs)).abs().max() > 1e-3
