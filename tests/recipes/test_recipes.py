"""Every recipe from its settings to a saved model: base -> sft -> dpo and base -> r1_zero."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import ConfigError, DataError
from posttrain.models.load import load_model
from posttrain.run.options import load
from posttrain.run.settings import ModelConfig, RunConfig
from posttrain.trainers.fit import training_arguments
from recipes import base, dpo, r1_zero, sft
from tests.recipes.conftest import ROOT, Run, card_of, run, run_snippet

RECIPES = {"base": base, "sft": sft, "dpo": dpo, "r1_zero": r1_zero}
FROM_A_MODEL = ("sft", "dpo", "r1_zero")
STEPS = 3


@pytest.fixture(scope="module")
def problems(memorised, tmp_path_factory) -> str:
    """The memorised problem, four times: enough prompts for a rollout."""
    row = {"question": memorised[1].question, "answer": memorised[1].answer}
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text((json.dumps(row) + "\n") * 4)
    return str(path)


@pytest.fixture(scope="module")
def settings(problems, first_rows) -> dict[str, dict]:
    """Small data and few steps, for the recipes that start from a model."""
    few = {"max_steps": STEPS, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    group = {"num_generations": 4, "per_device_train_batch_size": 16}
    return {
        "sft": {**few, "dataset": first_rows("sft", 12)},
        "dpo": {**few, "dataset": first_rows("preferences", 4)},
        "r1_zero": {**few, **group, "dataset": problems, "max_completion_length": 40},
    }


@pytest.fixture(scope="module")
def chain(base_run, settings, first_rows) -> dict[str, Run]:
    root = base_run.folder.parent
    runs = {"base": base_run}
    runs["sft"] = run(
        sft, root / "sft", model_name_or_path=base_run.model, eval_steps=STEPS,
        eval_dataset=first_rows("sft", 4), **settings["sft"],
    )  # fmt: skip
    runs["dpo"] = run(dpo, root / "dpo", model_name_or_path=runs["sft"].model, **settings["dpo"])
    runs["r1_zero"] = run(
        r1_zero, root / "r1_zero", model_name_or_path=base_run.model, eval_steps=STEPS,
        eval_dataset=first_rows("heldout", 4), **settings["r1_zero"],
    )  # fmt: skip
    return runs


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_folder_holds_settings_environment_metrics_and_model(chain, name):
    done = chain[name]
    found = {path.name for path in done.folder.iterdir()}
    of_recipe = {
        "sft": {"samples.jsonl", "held_out_before.json"},
        "dpo": {"checkpoints"},
        "r1_zero": {"samples.jsonl"},
    }
    files = of_recipe.get(name, set())
    assert found == {".lock", "config.yaml", "env.json", "metrics.jsonl", "model"} | files
    assert load(type(done.config), ["--config", str(done.folder / "config.yaml")]) == done.config
    environment = json.loads((done.folder / "env.json").read_text())
    assert environment["world_size"] == 1
    assert environment["packages"]["torch"] == torch.__version__
    assert f"model   saved to {done.model}" in done.said
    assert f"{done.config.max_steps} steps\n" in card_of(done).text


@pytest.mark.parametrize("name", RECIPES)
def test_a_card_says_where_the_model_came_from_and_its_snippet_runs(chain, name, capsys):
    done = chain[name]
    card, source = card_of(done), chain[name].config.model_name_or_path
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a model of this disk is found nowhere else
    assert {"posttrain", done.environment["trainer"].removesuffix("Trainer").lower()} <= {
        *card.data.tags
    }
    assert not source or f"- base model: `{source}`, a local folder (SHA-256 `" in card.text
    assert f"- data: `{done.config.dataset}` (SHA-256 `" in card.text
    assert done.environment["command"] in card.text
    if name == "r1_zero":
        lines = (done.folder / "samples.jsonl").read_text().splitlines()
        first = next(x for x in map(json.loads, lines) if x["step"] == STEPS)
        assert f"## Samples of step {STEPS}" in card.text
        assert first["prompt"].rstrip() in card.text
        assert "| accuracy on 4 rows, held out | " in card.text
    run_snippet(card)
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_each_step_is_logged_and_said(chain, name):
    done = chain[name]
    steps = range(1, done.config.max_steps + 1)
    assert [record["step"] for record in done.metrics] == list(steps)
    for record in done.metrics:
        assert math.isfinite(record["loss"])
        assert record["tokens_per_second"] > 0
        assert f"step {record['step']}/{len(steps)}  loss {record['loss']:.3f}" in done.said


@pytest.mark.parametrize("name", RECIPES)
def test_the_saved_model_is_the_trained_one_and_answers(chain, name):
    trained = chain[name].trainer.model.state_dict()
    model = AutoModelForCausalLM.from_pretrained(chain[name].model)
    tokenizer = AutoTokenizer.from_pretrained(chain[name].model)
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(weight, trained[key], rtol=0, atol=0)
    prompt = tokenizer("What is 123 + 456?", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids.shape[1] == prompt["input_ids"].shape[1] + 4
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.parametrize("name", FROM_A_MODEL)
def test_training_moves_every_weight_it_started_from(chain, name):
    start = AutoModelForCausalLM.from_pretrained(chain[name].config.model_name_or_path)
    trained = AutoModelForCausalLM.from_pretrained(chain[name].model).state_dict()
    for key, weight in start.state_dict().items():
        assert not torch.equal(weight, trained[key]), key


def test_base_starts_from_random_weights_and_learns_its_text(chain):
    """At first all tokens are about equally likely: a loss of log of the vocabulary's size."""
    first, *_, last = (record["loss"] for record in chain["base"].metrics)
    vocabulary = chain["base"].trainer.model.config.vocab_size
    assert first == pytest.approx(math.log(vocabulary), abs=0.6)
    assert last < 0.5


def test_dpo_starts_at_log_two_and_widens_the_margin(chain):
    metrics = chain["dpo"].metrics
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["margin"] > 0
    assert "reference log-probs of 4 rows, once, before the first step" in chain["dpo"].said


def test_r1_zero_rewards_right_and_well_formed_answers(chain):
    """Reward = accuracy + 0.2 format; some groups have a spread, or nothing could be learned."""
    for record in chain["r1_zero"].metrics:
        assert record["reward"] == pytest.approx(record["accuracy"] + 0.2 * record["format"])
        assert record["sampler_gap"] < 1e-4
    assert any(0 < record["accuracy"] < 1 for record in chain["r1_zero"].metrics)
    assert any(record["reward_std_zero"] < 1 for record in chain["r1_zero"].metrics)
    assert "kl" not in chain["r1_zero"].metrics[0]
    assert chain["r1_zero"].trainer.reference is None


def test_r1_zero_keeps_samples_with_their_rewards(chain, memorised):
    lines = (chain["r1_zero"].folder / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    trained = [sample for sample in samples if sample["chosen"] != "held out"]
    assert {sample["step"] for sample in trained} == {1, 2, 3}
    for sample in trained:
        assert sample["prompt"].endswith(f"User: {memorised[1].question}\nAssistant:")
        assert sample["reward"] == pytest.approx(sample["accuracy"] + 0.2 * sample["format"])
        # The chain's base learned its solution with the tags, so a right text is a whole one.
        assert (sample["completion"] == memorised[1].solution) <= (sample["reward"] == 1.2)


def test_evaluation_runs_where_it_is_asked_for(chain):
    def held_out(name: str) -> set[str]:
        text = (chain[name].folder / "metrics.jsonl").read_text()
        records = map(json.loads, text.splitlines())
        return {key for record in records for key in record if key.startswith("eval_")}

    assert "eval_loss" in held_out("sft")
    assert {"eval_accuracy", "eval_format", "eval_mean_completion_tokens"} <= held_out("r1_zero")
    assert not held_out("dpo")


def test_held_out_problems_are_not_read_unless_they_are_asked_for(chain, settings, tmp_path):
    gone = {"eval_dataset": str(tmp_path / "gone.jsonl"), "model_name_or_path": chain["base"].model}
    run(r1_zero, tmp_path / "run", **{**settings["r1_zero"], **gone, "max_steps": 1})
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        run(r1_zero, tmp_path / "run2", eval_steps=1, **{**settings["r1_zero"], **gone})


def test_evaluation_without_data_is_refused():
    with pytest.raises(ConfigError, match=r"--eval_steps: expected 0 without an eval_dataset"):
        load(sft.Config, ["--eval_steps", "5"])
    assert load(r1_zero.Config, ["--eval_steps", "5"]).eval_dataset == "data/heldout.jsonl"


@pytest.mark.parametrize("name", FROM_A_MODEL)
def test_lora_saves_an_adapter_that_loads_merges_and_leaves_the_model_alone(
    chain, settings, name, tmp_path
):
    start = chain["base"].model
    before = Path(start, "model.safetensors").read_bytes()
    done = run(
        RECIPES[name], tmp_path / name, model_name_or_path=start, use_peft=True, lora_r=4,
        **settings[name],
    )  # fmt: skip
    assert "of them trained (LoRA)" in done.said
    assert (done.folder / "model" / "adapter_config.json").is_file()
    assert not (done.folder / "model" / "model.safetensors").exists()
    assert Path(start, "model.safetensors").read_bytes() == before
    assert card_of(done).data.library_name == "peft"
    run_snippet(card_of(done))

    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(start)(ids).logits
        adapted = AutoModelForCausalLM.from_pretrained(done.model)(ids).logits
        merged = load_model(ModelConfig(model_name_or_path=done.model), quiet=True)
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - bare).abs().max() > 1e-3
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_the_same_command_again_moves_the_first_run_aside(chain, settings, tmp_path):
    few = {**settings["sft"], "max_steps": 1, "model_name_or_path": chain["base"].model}
    first = run(sft, tmp_path / "sft", **few)
    held = (first.folder / "metrics.jsonl").read_bytes()
    second = run(sft, tmp_path / "sft", **few)
    aside = tmp_path / "sft.1"
    assert "moved" not in first.said
    assert f"{first.folder} held an earlier run: moved to {aside}." in second.said
    assert (aside / "metrics.jsonl").read_bytes() == held
    assert (aside / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["sft", "r1_zero"])
def test_the_config_of_a_run_gives_the_same_weights_again(chain, name, tmp_path):
    done = chain[name]
    config = load(type(done.config), ["--config", str(done.folder / "config.yaml")])
    again = RECIPES[name].main(replace(config, output_dir=str(tmp_path / name)))
    for key, weight in done.trainer.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[key]), key


UNUSUAL = {
    "seed": 5, "max_steps": 7, "num_train_epochs": 2.5, "learning_rate": 0.123,
    "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 3.0, "weight_decay": 0.01,
    "adam_beta2": 0.77, "max_grad_norm": 0.5, "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 6, "logging_steps": 9, "eval_steps": 11, "save_steps": 13,
}  # fmt: skip


def test_every_setting_of_a_run_reaches_transformers(tmp_path):
    config = sft.Config(
        output_dir=str(tmp_path), eval_dataset="x", trainer={"adam_epsilon": 1e-3}, **UNUSUAL
    )
    arguments = training_arguments(config)
    assert {name: getattr(arguments, name) for name in UNUSUAL} == UNUSUAL
    assert arguments.adam_epsilon == 1e-3
    # Whatever else both classes know by one name is ours to decide, and is handled elsewhere.
    shared = {f.name for f in fields(RunConfig)} & {f.name for f in fields(type(arguments))}
    assert shared - set(UNUSUAL) == {
        *("output_dir", "save_total_limit", "report_to"),
        *("push_to_hub", "hub_model_id", "hub_private_repo"),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_without_flags_trains_with_its_own_defaults(name, tmp_path):
    config = RECIPES[name].Config()
    arguments = training_arguments(replace(config, output_dir=str(tmp_path)))
    for setting in ("learning_rate", "per_device_train_batch_size", "max_steps", "adam_beta2"):
        assert getattr(arguments, setting) == getattr(config, setting)
    assert (ROOT / config.dataset).is_file()
    assert config.output_dir == f"runs/{name}"
