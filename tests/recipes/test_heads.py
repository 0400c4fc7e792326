"""recipes/medusa.py and recipes/mtp.py, from settings to heads beside a model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.families import tiny_model
from posttrain.errors import ConfigError
from posttrain.heads import MTPModules, add_heads, load_heads, save_heads, without_heads
from posttrain.models.load import load_model, load_tokenizer
from posttrain.packed.prepare import prepare
from posttrain.run.options import load
from posttrain.run.settings import ModelConfig
from recipes import medusa, mtp
from tests.recipes.conftest import TOKENIZER, run

FEW = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def few(first_rows):
    return {**FEW, "dataset": first_rows("sft", 12)}


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(ours, theirs):
    return all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_medusa_1_leaves_the_model_and_goes_on_with_its_heads(base_run, few, tmp_path):
    done = run(medusa, tmp_path / "first", model_name_or_path=base_run.model, num_heads=2, **few)
    assert same(weights_of(base_run.model), weights_of(done.model))
    assert done.metrics[-1]["loss"] < done.metrics[0]["loss"]
    assert "2 new Medusa heads" in done.said
    model = load_model(ModelConfig(model_name_or_path=done.model), quiet=True)
    heads = load_heads(done.model, model)
    assert (heads.kind, heads.depth) == ("medusa", 2)
    again = run(medusa, tmp_path / "second", model_name_or_path=done.model, **few)
    assert f"2 Medusa heads of {done.model}, trained on" in again.said
    assert again.metrics[0]["loss"] < done.metrics[0]["loss"]
    with pytest.raises(ConfigError, match="it has 2 of kind medusa"):
        run(medusa, tmp_path / "third", model_name_or_path=done.model, num_heads=3, **few)


def test_medusa_2_on_its_own_completions_reads_them_again_when_resumed(base_run, few, tmp_path):
    settings = {
        **few,
        "model_name_or_path": base_run.model,
        "train_model": True,
        "use_peft": True,
        "own_completions": True,
        "max_completion_length": 12,
        "head_warmup_steps": 1,
        "save_steps": 2,
    }
    done = run(medusa, tmp_path / "run", **settings)
    lines = (done.folder / "completions.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert len(lines) == 12
    assert 0 < len(row["input_ids"]) - row["prompt_tokens"] <= 12
    assert "teacher_kl" not in done.metrics[0]  # the heads warm up
    assert done.metrics[1]["teacher_kl"] == pytest.approx(0, abs=1e-5)
    again = run(medusa, tmp_path / "run", resume=True, **{**settings, "max_steps": 4})
    assert "the model's own completions are in" in again.said
    assert [record["step"] for record in again.metrics] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_mtp_trains_new_modules_with_the_model_and_alone(kind, base_run, few, tmp_path):
    settings = {**few, "model_name_or_path": base_run.model, "kind": kind, "num_modules": 2}
    joint = run(mtp, tmp_path / "joint", **settings)
    assert not same(weights_of(base_run.model), weights_of(joint.model))
    alone = run(mtp, tmp_path / "alone", train_model=False, **settings)
    assert same(weights_of(base_run.model), weights_of(alone.model))
    for done in (joint, alone):
        assert done.metrics[-1]["loss"] < done.metrics[0]["loss"]
        assert "accuracy_ahead_3" in done.metrics[0]
        assert (done.folder / "model" / "heads" / "config.json").is_file()


def test_mtp_keeps_the_modules_of_a_checkpoint_or_trains_them(few, tmp_path):
    tokenizer = load_tokenizer(TOKENIZER)
    model = tiny_model("glm4_moe")
    model.resize_token_embeddings(len(tokenizer))
    prepare(model)
    add_heads(model, MTPModules.on(model, num_modules=1))
    with without_heads(model):
        model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    save_heads(model, tmp_path / "start")
    before = (tmp_path / "start" / "mtp.safetensors").read_bytes()
    for weight, kept in ((0.0, True), (0.3, False)):
        folder, source = tmp_path / f"run{weight}", str(tmp_path / "start")
        done = run(mtp, folder, model_name_or_path=source, mtp_weight=weight, **few)
        assert f"1 sequential of {source}, trained on" in done.said
        from safetensors.torch import load, load_file

        found, old = load_file(folder / "model" / "mtp.safetensors"), load(before)
        assert found.keys() == old.keys()
        own = {n: w for n, w in old.items() if not n.endswith(("tokens.weight", "head.weight"))}
        assert same(own, found) == kept
    with pytest.raises(ConfigError, match="which has 1 sequential embedding_hidden"):
        run(mtp, tmp_path / "other", model_name_or_path=source, num_modules=2, **few)


MISTAKES = [
    (medusa, ["--lambda0", "0.1"], "lambda0: expected --train_model with it"),
    (medusa, ["--temperature", "0.5"], "temperature: expected --own_completions with it"),
    (medusa, ["--use_peft"], "use_peft: expected --train_model with it"),
    (medusa, ["--own_completions", "--train_model"], "expected --use_peft with --train_model"),
    (mtp, ["--kind", "parallel", "--order", "hidden_embedding"], "order: expected --kind seq"),
    (mtp, ["--mtp_weight", "0", "--no_train_model"], "mtp_weight: expected a weight above 0"),
    (mtp, ["--use_peft", "--quantization", "int8"], "quantization: expected none"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "flags", "message"), MISTAKES)
def test_settings_that_could_not_act_are_refused_in_one_line(recipe, flags, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=message) as refused:
        load(recipe.Config, flags)
    assert "\n" not in str(refused.value)
