"""Heads beside a saved model: what is written, and that it is read again."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from benchmarks.families import tiny_model
from posttrain.errors import ConfigError
from posttrain.heads import (
    GrowingCache,
    MTPModules,
    add_heads,
    check_heads,
    continued_modules,
    heads_of,
    load_heads,
    save_heads,
    scores_ahead,
    without_heads,
)
from posttrain.heads.names import weight_files
from posttrain.heads.trunk import attention_layer, run_trunk
from posttrain.models.load import load_whole
from posttrain.packed.forward import packed_inputs
from posttrain.packed.prepare import prepare
from tests.heads.common import MAKE, prepared, row_of_documents, stir

NATIVE = ("deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
CLOSE = {"rtol": 0, "atol": 1e-5}


def saved(model, folder):
    with without_heads(model):
        model.save_pretrained(folder)
    save_heads(model, folder)
    return folder


def with_heads(kind, **settings):
    model = prepared(**settings)
    add_heads(model, stir(MAKE[kind](model)))
    return model


def with_modules(family):
    model = tiny_model(family)
    prepare(model)
    add_heads(model, stir(MTPModules.on(model, num_modules=2)))
    return model


def read_again(folder):
    model = load_whole(AutoModelForCausalLM, str(folder))
    prepare(model)
    return model


def same_weights(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", MAKE)
def test_heads_are_read_as_they_were_and_the_model_loads_without_them(kind, tmp_path):
    model = with_heads(kind)
    saved(model, tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with without_heads(model):
        assert same_weights(plain, model)
    check_heads(tmp_path, tmp_path)
    read = load_heads(tmp_path, read_again(tmp_path))
    assert same_weights(read.module, heads_of(model))
    assert read.depth == heads_of(model).depth


@pytest.mark.parametrize("drafted_ids", [None, [0, 5, 96]])
def test_medusa_is_written_in_the_layout_of_vllm(drafted_ids, tmp_path):
    """Heads that draft few tokens here keep the LM heads of all, as vLLM reads them.

    vLLM 0.30.0 does not look at `drafted_ids`. It has `truncated_vocab_size` and `token_map`, but
    asks for LM heads of the whole vocabulary then and is given some rows of them.
    """
    model = with_heads("medusa")
    heads_of(model).drafted_ids = drafted_ids
    saved(model, tmp_path)
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    expected = {"architectures": ["MedusaModel"], "model_type": "medusa", "num_heads": 3}
    expected |= {"hidden_size": 32, "vocab_size": 97, "medusa_fc_bias": True}
    assert expected.items() <= config.items()
    # vLLM takes any setting with "num" and "heads", or "num" and "layers", for these two.
    counts = {n for n in config if "num" in n and ("heads" in n or "layers" in n)}
    assert counts == {"num_heads", "num_hidden_layers"}
    assert "truncated_vocab_size" not in config
    names = {n: tuple(w.shape) for n, w in load_file(tmp_path / "heads/model.safetensors").items()}
    assert names == {
        name: shape
        for i in range(3)
        for name, shape in {
            f"blocks.{i}.layers.0.weight": (32, 32),
            f"blocks.{i}.layers.0.bias": (32,),
            f"lm_heads.{i}.weight": (97, 32),
        }.items()
    }


@pytest.mark.parametrize("family", NATIVE)
def test_modules_of_a_checkpoint_are_written_back_under_the_names_of_its_family(family, tmp_path):
    model = with_modules(family)
    saved(model, tmp_path)
    again = read_again(tmp_path)  # refuses a model with weights that have no place
    assert same_weights(continued_modules(again, str(tmp_path)), heads_of(model))
    names = {}
    for path in weight_files(str(tmp_path)):
        with safe_open(path, framework="pt") as file:
            names[path.name] = set(file.keys())
    # A module's block has the names that transformers writes for a layer of the model.
    index = attention_layer(model)[0]
    mine, shard = f"model.layers.{index}.", "model-00001-of-00001.safetensors"
    layer = {n.removeprefix(mine) for n in names[shard] if n.startswith(mine)}
    marks = {"layers": "model.layers.2.", "mtp": "mtp.layers.0."}
    mark = marks["mtp" if family.startswith("qwen") else "layers"]
    block = {n.removeprefix(mark) for n in names["mtp.safetensors"] if n.startswith(mark)}
    own = {n for n in block if re.match(r"enorm|hnorm|eh_proj|shared_head|embed_tokens", n)}
    assert block - own == layer
    others = {n for n in names["mtp.safetensors"] if ".layers." not in n}
    parts = ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    assert others == ({f"mtp.{n}.weight" for n in parts} if family.startswith("qwen") else set())
    count = "mtp_num_hidden_layers" if "qwen3_5" in family else "num_nextn_predict_layers"
    assert json.loads((tmp_path / "config.json").read_text())[count] == 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {file: {n for n, f in index.items() if f == file} for file in names} == names


def test_experts_that_the_file_has_as_one_weight_are_written_back_as_one(tmp_path):
    saved(with_modules("qwen3_next"), tmp_path)
    tensors = load_file(tmp_path / "mtp.safetensors")
    single = {n for n in tensors if re.search(r"experts\.\d", n)}
    heads = continued_modules(read_again(tmp_path), str(tmp_path))
    experts = dict(heads.layers[0].block.mlp.experts.named_parameters())
    for module in (0, 1):
        experts = heads.layers[module].block.mlp.experts
        for name, weight in experts.named_parameters():
            tensors[f"mtp.layers.{module}.mlp.experts.{name}"] = weight.detach().clone()
    save_file({n: t for n, t in tensors.items() if n not in single}, tmp_path / "mtp.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    model = read_again(tmp_path)
    add_heads(model, continued_modules(model, str(tmp_path)))
    assert same_weights(heads_of(model), heads)
    save_heads(model, tmp_path)
    assert not any(re.search(r"experts\.\d", n) for n in load_file(tmp_path / "mtp.safetensors"))
    assert index.is_file()


def test_a_written_module_is_what_transformers_own_reader_makes_of_it(tmp_path, monkeypatch):
    """transformers drafts with such modules in `generate(use_mtp=True)`."""
    model = tiny_model("deepseek_v3")
    prepare(model)
    add_heads(model, stir(MTPModules.on(model, num_modules=1)))
    saved(model, tmp_path)
    pattern = [r"model\.layers\.2.*"]  # of the released model it is layer 61
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", pattern)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = MtpModel.from_pretrained(plain)
    ids = torch.arange(3, 12)[None]
    states = plain.model(ids, use_cache=False).last_hidden_state
    positions = torch.arange(8)[None] + 1
    expected = theirs.forward_layer(0, states[:, :-1], positions, None, input_ids=ids[:, 1:])
    read = load_heads(tmp_path, read_again(tmp_path))
    found, logits = read.step(states[:, :-1], ids[:, 1:], positions)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(logits, plain.lm_head(expected[:, -1]), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_steps_over_a_cache_are_the_packed_forward(family, tmp_path):
    model = with_heads("mtp") if family == "llama" else with_modules(family)
    segments, batch = row_of_documents((9,))
    expected = scores_ahead(model, batch, segments, with_base=False).heads
    states, _ = run_trunk(model, packed_inputs(batch))
    saved(model, tmp_path)
    heads = load_heads(tmp_path, read_again(tmp_path))
    ids, positions = batch.input_ids, torch.arange(9)[None]
    with torch.no_grad():
        for depth in (1, 2):
            cache, found, deeper = GrowingCache(), [], []
            parts = [slice(0, 4), *(slice(i, i + 1) for i in range(4, 9 - depth))]
            for part in parts:
                tokens = ids[:, part.start + depth : part.stop + depth]
                new, logits = heads.step(
                    states[:, part], tokens, positions[:, part], depth=depth, cache=cache
                )
                deeper.append(new)
                if part.stop + depth < 9:
                    found.append(logits.log_softmax(-1)[0, ids[0, part.stop + depth]])
            wanted = expected[depth - 1].logps[-len(found) :]
            torch.testing.assert_close(torch.stack(found), wanted, **CLOSE)
            states = torch.cat(deeper, 1)


def test_medusa_drafts_what_it_was_trained_to_say(tmp_path):
    model = with_heads("medusa")
    segments, batch = row_of_documents((9,))
    expected = scores_ahead(model, batch, segments, with_base=False).heads
    states, _ = run_trunk(model, packed_inputs(batch))
    saved(model, tmp_path)
    heads = load_heads(tmp_path, read_again(tmp_path))
    for k, logits in enumerate(heads.draft_logits(states[0]), 2):
        logps = logits[: 9 - k].log_softmax(-1).gather(1, batch.input_ids[0, k:, None])[:, 0]
        torch.testing.assert_close(logps[-len(expected[k - 2].logps) :], expected[k - 2].logps)


OTHERS = {
    "hidden_size": ({"hidden_size": 64}, "expected hidden_size 64, found 32"),
    "vocabulary": ({"vocab_size": 98}, "expected vocab_size 98, found 97"),
    "family": ({"family": "qwen3"}, "expected model_type qwen3, found llama"),
    "layers": ({"num_hidden_layers": 3}, "expected num_hidden_layers 3, found 2"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_heads_of_another_model_are_refused_before_a_weight_is_read(other, tmp_path):
    settings, message = OTHERS[other]
    saved(with_heads("medusa"), tmp_path / "ours")
    model = prepared(**settings)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours" / "heads" / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ConfigError, match=message):
        check_heads(tmp_path / "ours", tmp_path / "theirs")
    with pytest.raises(ConfigError, match=message):
        load_heads(tmp_path / "ours", model)


def test_a_model_without_heads_is_refused_with_what_was_expected(tmp_path):
    prepared().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"expected heads, as recipes/medusa.py"):
        check_heads(tmp_path, tmp_path)


def test_a_module_that_is_not_whole_or_has_more_is_refused(tmp_path):
    saved(with_modules("glm4_moe"), tmp_path)
    tensors, path = load_file(tmp_path / "mtp.safetensors"), tmp_path / "mtp.safetensors"
    model = read_again(tmp_path)
    more = tensors | {"model.layers.3.eh_proj.weight_scale_inv": torch.ones(1)}
    fewer = {n: t for n, t in tensors.items() if n != "model.layers.2.mlp.experts.1.up_proj.weight"}
    other = tensors | {"model.layers.2.enorm.weight": torch.ones(5)}
    for found, message in (
        (more, "eh_proj.weight_scale_inv .* has no place"),
        (fewer, r"experts.1.up_proj.weight is missing"),
        (other, r"enorm.weight makes a weight of shape \(5,\), expected \(64,\)"),
    ):
        save_file(found, path)
        with pytest.raises(ConfigError, match=message):
            continued_modules(model, str(tmp_path))


def test_drafting_asks_for_the_way_that_its_kind_has(tmp_path):
    model = prepared()
    for kind, ask, message in (
        ("mtp", lambda h: h.draft_logits(torch.zeros(1, 32)), "one step after the other"),
        ("medusa", lambda h: h.step(torch.zeros(1, 1, 32), *[torch.zeros(1, 1)] * 2), "no steps"),
    ):
        saved(with_heads(kind), tmp_path / kind)
        with pytest.raises(ConfigError, match=message):
            ask(load_heads(tmp_path / kind, model))
