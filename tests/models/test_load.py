"""Loading: what is refused with a plain word, what is loaded in which precision, LoRA."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.errors import ConfigError
from posttrain.models import load as loading
from posttrain.models.load import (
    load_for_inference,
    load_model,
    load_tokenizer,
    make_trainable,
)
from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.run.engine import half_dtype, this_device
from posttrain.run.settings import ModelConfig
from tests.conftest import make_model

IDS = torch.arange(3, 20)[None]


@pytest.fixture
def saved(tmp_path, number_tokenizer) -> str:
    """A model in bfloat16, as models on the Hub are."""
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    number_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def config(model: str, **settings) -> ModelConfig:
    return ModelConfig(model_name_or_path=model, **settings)


def trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["/no/where", "./no/where", "a/b/c", "runs/nothing", "nothing"])
def test_a_model_that_is_not_there_is_one_line_that_names_it(name):
    for load in (load_tokenizer, lambda name: load_model(config(name))):
        with pytest.raises(ConfigError, match=f"--model_name_or_path: .*{name}") as caught:
            load(name)
        assert "\n" not in str(caught.value)
        assert "owner/name" in str(caught.value)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, number_tokenizer):
    number_tokenizer.eos_token = None
    number_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no end-of-sequence token.*Set `eos_token`"):
        load_tokenizer(str(tmp_path))


def test_half_precision_is_what_was_asked_for_and_float32_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked, of = ("auto", "float32", "bfloat16", "float16"), torch.bfloat16
    assert [half_dtype(dtype) for dtype in asked] == [None, None, of, torch.float16]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert [half_dtype(dtype) for dtype in asked] == [of, None, of, torch.float16]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert not half_dtype("auto")  # it would only be emulated


def test_the_cpu_is_used_where_accelerate_was_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert this_device({"LOCAL_RANK": "3"}) == torch.device("cuda", 3)
    assert this_device({"ACCELERATE_USE_CPU": "true"}) == torch.device("cpu")
    assert not half_dtype("auto", {"ACCELERATE_USE_CPU": "true"})


def test_weights_are_float32_whatever_they_were_saved_in(saved):
    model = load_model(config(saved), quiet=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)


def test_what_was_chosen_is_said_in_one_line(saved, capsys):
    model = load_model(config(saved))
    count = sum(parameter.numel() for parameter in model.parameters())
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith(f"model   {saved}: {count / 1e6:.2f}M parameters; cpu")
    assert "float32" in said
    assert "attention" in said
    load_model(config(saved), quiet=True)
    assert capsys.readouterr().out == ""


def test_lora_trains_two_thin_matrices_for_every_linear_layer_but_the_head(saved, capsys):
    """Rank r adds r (in + out) to each: q and o 32 -> 32, k and v 32 -> 16, three 32 <-> 48."""
    model = load_model(config(saved, use_peft=True, lora_r=4))
    layer = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    assert trainable(model) == 4 * layer
    assert "of them trained (LoRA)" in capsys.readouterr().out
    assert not any("lora" in name and "head" in name for name, _ in model.named_parameters())


def test_lora_keeps_to_the_layers_it_is_given(saved):
    chosen = config(saved, use_peft=True, lora_r=4, lora_target_modules=["q_proj"])
    assert trainable(load_model(chosen, quiet=True)) == 4 * (32 + 32)
    wrong = config(saved, use_peft=True, lora_target_modules=["q_proj", "query"])
    with pytest.raises(ConfigError, match=r"--lora_target_modules: .* no module named query"):
        load_model(wrong, quiet=True)


def test_an_adapter_is_loaded_on_its_base_merged_and_can_be_trained_whole(saved, tmp_path):
    """W + (alpha / rank) B A, by hand in one layer."""
    adapted = load_model(config(saved, use_peft=True, lora_r=4, lora_alpha=8), quiet=True)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load_model(config(str(tmp_path / "adapter")), quiet=True)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    by_hand = layer.base_layer.weight + 8 / 4 * layer.lora_B.default.weight @ (
        layer.lora_A.default.weight
    )
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, by_hand)
    assert trainable(merged) == sum(parameter.numel() for parameter in merged.parameters())
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted.eval()(IDS).logits)


def test_below_an_adapter_linear_layers_are_held_in_the_dtype_of_the_forward(saved):
    """2 bytes a weight, and the log-probs of a float32 base under autocast to the bit."""
    settings = {"use_peft": True, "lora_r": 4}
    model = load_model(config(saved, dtype="bfloat16", **settings), quiet=True)
    for name, parameter in model.named_parameters():
        is_held = "base_layer" in name or "lm_head" in name
        assert parameter.dtype == (torch.bfloat16 if is_held else torch.float32), name
        assert not (parameter.requires_grad and is_held)
    plain = load_model(config(saved, **settings), quiet=True)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    batch = pack_groups([[5, 6]], [[[8, 1], [9, 10, 1]]], device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (packed_logps(m.eval(), batch).logps for m in (model, plain))
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_model_to_be_used_as_it_is_keeps_its_dtype_where_the_device_computes_in_it(
    saved, monkeypatch
):
    assert {p.dtype for p in load_for_inference(config(saved)).parameters()} == {torch.float32}
    monkeypatch.setattr(loading, "half_dtype", lambda _dtype: torch.bfloat16)
    model = load_for_inference(config(saved))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert model(IDS).logits.dtype == torch.bfloat16  # an ordinary forward, without autocast


def test_adding_an_adapter_copies_the_random_state_of_no_other_gpu(monkeypatch):
    """A machine with two GPUs, on which fork_rng() alone would warn and then ask both."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    model = make_model()
    state = torch.get_rng_state()
    make_trainable(model, config("x", use_peft=True), quiet=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_making_a_model_trainable_moves_no_weight_and_draws_no_number():
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    make_trainable(model, config("x"), quiet=True)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
