"""LoRA and its relatives: exact on packed batches, read again as trained, and said in words."""

import pytest
import torch

from benchmarks.families import tiny_model
from posttrain.errors import ConfigError
from posttrain.models.load import load_model, make_trainable
from posttrain.models.lora import lora_summary
from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.run.settings import ModelConfig
from tests.conftest import logps_alone, make_model, make_tokenizer

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "embeddings": {"lora_modules_to_save": ["embed_tokens"]},
    "head": {"lora_modules_to_save": ["lm_head"]},
}


def adapted(model: torch.nn.Module, **settings) -> torch.nn.Module:
    """The model with an adapter that changes it: B is 0 at first."""
    config = ModelConfig(
        model_name_or_path="tiny", use_peft=True, lora_r=4, dtype="float32", **settings
    )
    model = make_trainable(model, config, quiet=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_are_those_of_a_forward_of_the_text_alone(kind):
    model = adapted(make_model(num_hidden_layers=2), **KINDS[kind])
    prompt, answers = [5, 6, 7, 8], [[9, 10], [11, 12, 13]]
    batch = pack_groups([prompt], [answers], device=torch.device("cpu"))
    packed_logps(model, batch).logps.sum().backward()
    found = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    assert found.keys() == {name for name, w in model.named_parameters() if w.requires_grad}
    ours = packed_logps(model, batch).logps
    model.zero_grad()
    plain = logps_alone(model, prompt, answers)
    assert torch.allclose(ours, plain, atol=1e-5)
    plain.sum().backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert (found[name] - weight.grad).norm() <= 1e-4 * weight.grad.norm() + 1e-7, name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_read_again_as_it_was_trained(kind, tmp_path):
    make_model(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = ModelConfig(model_name_or_path=str(tmp_path / "base"))
    model = adapted(load_model(base, quiet=True), **KINDS[kind])
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(ModelConfig(model_name_or_path=str(tmp_path / "adapter")), quiet=True)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        gap = (again(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max()
    assert gap < 1e-4


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank():
    layers = [adapted(make_model(), use_rslora=on).base_model.model.model.layers for on in (0, 1)]
    scales = [layer[0].self_attn.q_proj.scaling["default"] for layer in layers]
    assert scales == [32 / 4, 32 / 2]


def test_the_summary_names_every_layer_with_an_adapter_and_those_trained_whole():
    model = adapted(make_model(num_hidden_layers=2), lora_modules_to_save=["lm_head"])
    said = lora_summary(model)
    assert said.startswith("q_proj x2, k_proj x2, v_proj x2, o_proj x2, ")
    assert said.endswith("down_proj x2; trained whole: lm_head")


def test_experts_of_one_weight_are_named_or_left_out():
    said = lora_summary(adapted(tiny_model("qwen3_moe")))
    assert "experts' gate_up_proj x2" in said
    said = lora_summary(adapted(tiny_model("qwen3_moe"), lora_skip_experts=True))
    assert "expert" not in said
    assert "q_proj x2" in said
    with pytest.raises(ConfigError, match="--lora_skip_experts"):
        adapted(tiny_model("qwen3_moe"), lora_dropout=0.1)
    adapted(tiny_model("qwen3_moe"), lora_dropout=0.1, lora_skip_experts=True)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "qwen2_moe"])
def test_experts_are_left_out_where_other_layers_have_their_names(family):
    """Dense first layers and shared experts: PEFT takes their names for the fused experts'."""
    said = lora_summary(adapted(tiny_model(family), lora_skip_experts=True))
    assert "expert" not in said
    assert "o_proj x" in said


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_end_that_shares_its_weight_cannot_be_trained_alone(name):
    with pytest.raises(ConfigError, match=f"{name} shares its weight"):
        adapted(make_model(tie_word_embeddings=True), lora_modules_to_save=[name])


def test_ends_of_other_names_that_share_a_weight_cannot_either():
    with pytest.raises(ConfigError, match="word_embeddings shares its weight"):
        adapted(tiny_model("bloom"), lora_modules_to_save=["word_embeddings"])


def test_by_default_a_projection_that_mambas_kernels_read_has_no_adapter():
    said = lora_summary(adapted(tiny_model("nemotron_h")))
    assert "in_proj x1" in said
    assert "out_proj" not in said
