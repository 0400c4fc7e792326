"""No weight is invented, dropped or broken unsaid."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from posttrain.errors import ConfigError
from posttrain.models import load as loading
from posttrain.models.load import load_model, load_tokenizer
from posttrain.models.reward_model import load_reward_model
from posttrain.run.settings import ModelConfig
from tests.conftest import make_model, make_tokenizer

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def saved(base, tmp_path):
    """A copy of a whole model, to be damaged."""
    shutil.copytree(base, tmp_path / "model")
    return tmp_path / "model"


def load(folder, **settings):
    return load_model(ModelConfig(model_name_or_path=str(folder), **settings), quiet=True)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(folder, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_weight_is_named(saved):
    change_weights(saved, lambda weights: weights.pop(NAME))
    assert f"{NAME} is missing, which LlamaForCausalLM needs" in refusal(saved)


def test_a_weight_without_a_place_is_named(saved):
    change_weights(saved, lambda weights: weights.update({"extra.weight": torch.ones(2)}))
    assert "extra.weight has no place in LlamaForCausalLM: it would be dropped" in refusal(saved)


def test_a_weight_of_another_shape_is_refused(saved):
    change_weights(saved, lambda weights: weights.update({NAME: torch.ones(2, 2)}))
    assert NAME in refusal(saved) or "mismatch" in refusal(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_name(saved, value):
    change_weights(saved, lambda weights: weights[NAME][0].fill_(value))
    assert f"holds numbers that are not finite, in {NAME} first" in refusal(saved)


def test_a_config_of_another_family_is_refused(saved):
    change_config(saved, model_type="gpt2")
    assert "is missing, which GPT2LMHeadModel needs" in refusal(saved)


def test_a_family_that_nobody_knows_is_refused(saved):
    change_config(saved, model_type="llamma")
    assert "llamma" in refusal(saved)


def test_a_reward_model_is_no_start_for_a_language_model(saved, tmp_path):
    scored = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1)
    scored.save_pretrained(tmp_path / "scored")
    assert "is missing" in refusal(tmp_path / "scored")
    config = ModelConfig(model_name_or_path=str(tmp_path / "scored"))
    make_tokenizer().save_pretrained(tmp_path / "scored")
    load_reward_model(config, make_tokenizer(), quiet=True)
    change_weights(tmp_path / "scored", lambda weights: weights.pop("score.weight"))
    with pytest.raises(ConfigError, match=r"score\.weight is missing"):
        load_reward_model(config, make_tokenizer(), quiet=True)


def test_a_tied_head_is_not_missing(tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    load(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "model.safetensors"), "cannot load .*SafetensorError"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot load .*model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "cannot load .*not a valid JSON"),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com"),
            "model.safetensors is a git-lfs pointer",
        ),
    ],
    ids=["truncated", "absent", "half a config", "a pointer"],
)
def test_broken_files_are_one_line(damage, message, saved):
    damage(saved)
    with pytest.raises(ConfigError, match=f"--model_name_or_path: .*{message}"):
        load(saved)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_one_line(name, saved):
    (saved / name).write_text('{"added_tok')
    with pytest.raises(ConfigError, match="--model_name_or_path: cannot load"):
        load_tokenizer(str(saved))


def test_a_run_folder_and_an_empty_one_are_named(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run / "model")
    (run / "config.yaml").write_text("")
    assert f"is a run folder. Its model is {run}/model." in refusal(run)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")


@pytest.fixture
def adapter(saved, tmp_path):
    """A saved LoRA adapter of the model."""
    load(saved, use_peft=True, lora_r=2).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_without_one_of_its_weights_is_refused(adapter):
    load(adapter)
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    gone = sorted(weights)[0]
    save_file({name: w for name, w in weights.items() if name != gone}, path)
    assert f"{gone} is missing" in refusal(adapter)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "adapter_config.json").write_text("{"),
        lambda f: (f / "adapter_model.safetensors").unlink(),
        lambda f: cut(f / "adapter_model.safetensors"),
    ],
    ids=["half a config", "no weights", "truncated"],
)
def test_a_broken_adapter_is_one_line(damage, adapter):
    damage(adapter)
    assert "--model_name_or_path: cannot load" in refusal(adapter)


def test_an_adapter_on_a_tied_head_cannot_be_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    start = make_model(tie_word_embeddings=True)
    start.name_or_path = str(tmp_path / "tied")
    model = get_peft_model(start, LoraConfig(r=2, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    assert "changes lm_head, whose weight the head and the embedding share" in refusal(
        tmp_path / "adapter"
    )


def test_adapters_of_earlier_versions_and_with_their_embeddings_are_loaded(adapter, base):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    torch.save(weights, adapter / "adapter_model.bin")
    path.unlink()
    load(adapter)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file({**weights, "base_model.model.model.embed_tokens.weight": embedding}, path)
    load(adapter)


def test_the_base_of_an_adapter_is_loaded_at_its_pinned_revision(adapter, monkeypatch):
    saved = json.loads((adapter / "adapter_config.json").read_text())
    pinned = {**saved, "revision": "abc123"}
    (adapter / "adapter_config.json").write_text(json.dumps(pinned))
    asked, plain = [], loading.load_whole

    def watched(*arguments, **settings):
        asked.append(settings["revision"])
        return plain(*arguments, **settings)

    monkeypatch.setattr(loading, "load_whole", watched)
    load(adapter)
    assert asked == ["abc123"]
