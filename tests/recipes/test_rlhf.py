"""The RLHF chain from settings to saved models: base -> reward model -> PPO on its scores."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.errors import ConfigError
from posttrain.packed.scalar import critic_of
from posttrain.run.options import load
from recipes import ppo, reward_model
from tests.recipes.conftest import ROOT, Run, card_of, run, run_snippet

CONFIGS = ROOT / "recipes" / "configs"


@pytest.fixture(scope="module")
def scorer(base_run, first_rows) -> Run:
    return run(
        reward_model, base_run.folder.parent / "reward_model", model_name_or_path=base_run.model,
        dataset=first_rows("preferences", 24), eval_dataset=first_rows("preferences", 8),
        max_steps=4, eval_steps=4, per_device_train_batch_size=8, learning_rate=1e-3,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["own", "shared"])
def policy(request, base_run, scorer, first_rows) -> Run:
    return run(
        ppo, base_run.folder.parent / f"ppo_{request.param}", value_trunk=request.param,
        model_name_or_path=base_run.model, reward_model=scorer.model, kl_target=1.0, epochs=2,
        dataset=first_rows("preferences", 16), max_steps=4, per_device_train_batch_size=8,
        max_completion_length=24,
    )  # fmt: skip


def test_the_reward_model_tells_chosen_from_rejected_and_is_saved_as_a_classifier(scorer):
    *_, last = scorer.metrics
    assert scorer.metrics[0]["pair_accuracy"] < 1
    assert last["margin"] > scorer.metrics[0]["margin"]
    text = (scorer.folder / "metrics.jsonl").read_text()
    before, after = [r for r in map(json.loads, text.splitlines()) if "eval_loss" in r]
    assert before["step"] == 0
    assert after["eval_pair_accuracy"] > 0.9
    saved = AutoModelForSequenceClassification.from_pretrained(scorer.model)
    trained = scorer.trainer.model.state_dict()
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight, trained[name]), name
    assert "with a score head" in scorer.said


def test_ppo_scores_with_the_reward_model_and_saves_a_policy(policy, base_run):
    for record in policy.metrics:
        if "score" in record:
            reward = record["score"] + record["missing_eos"]
            assert record["reward"] == pytest.approx(reward, abs=1e-4)
            assert record["sampler_gap"] < 1e-4
    assert any("kl_per_completion" in record for record in policy.metrics)
    assert policy.trainer.objective.kl_coef < 0.05  # the KL is below its target
    saved = AutoModelForCausalLM.from_pretrained(policy.model).state_dict()
    start = AutoModelForCausalLM.from_pretrained(base_run.model).state_dict()
    assert saved.keys() == start.keys()
    assert not any(torch.equal(weight, start[name]) for name, weight in saved.items())
    samples = (policy.folder / "samples.jsonl").read_text().splitlines()
    assert {"score", "missing_eos", "completion"} <= json.loads(samples[0]).keys()


def test_a_critic_of_its_own_begins_as_the_reward_model(policy, scorer):
    """All but its head, which begins at 0: the weights have moved by the learning rate only."""
    if policy.config.value_trunk == "shared":
        assert sum(p.numel() for p in critic_of(policy.trainer.model).parameters()) == 128
        return
    critic = critic_of(policy.trainer.model).state_dict()
    start = AutoModelForSequenceClassification.from_pretrained(scorer.model).state_dict()
    for name, weight in critic.items():
        gap = (weight - (start[name] if name != "score.weight" else 0)).abs().max()
        assert 0 < gap < 0.02, name


def test_lora_goes_through_the_whole_chain(base_run, first_rows, tmp_path):
    settings = {"use_peft": True, "lora_r": 4, "dataset": first_rows("preferences", 8),
                "max_steps": 2, "per_device_train_batch_size": 4}  # fmt: skip
    start = base_run.model
    scores = run(reward_model, tmp_path / "rm", model_name_or_path=start, **settings)
    done = run(
        ppo, tmp_path / "ppo", model_name_or_path=start, reward_model=scores.model, epochs=2,
        max_completion_length=16, **settings,
    )  # fmt: skip
    for model in (scores.model, done.model):
        assert (Path(model) / "adapter_config.json").is_file()
    assert card_of(scores).data.pipeline_tag == "text-classification"
    run_snippet(card_of(scores))
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(start)(ids).logits
        adapted = AutoModelForCausalLM.from_pretrained(done.model)(ids).logits
        trained = done.trainer.model.eval()(ids).logits
    torch.testing.assert_close(adapted, trained, atol=1e-4, rtol=1e-4)
    assert (adapted - bare).abs().max() > 1e-5


def test_a_margin_is_passed_on_and_a_bad_one_refused(base_run, first_rows, tmp_path):
    settings = {"model_name_or_path": base_run.model, "dataset": first_rows("preferences", 8),
                "max_steps": 1, "per_device_train_batch_size": 8}  # fmt: skip
    plain, wide = (
        run(reward_model, tmp_path / str(margin), margin=margin, **settings).metrics[0]["loss"]
        for margin in (None, 2.0)
    )
    assert wide > plain + 0.5
    with pytest.raises(ConfigError, match="margin"):
        load(reward_model.Config, ["--margin", "-1"])


@pytest.mark.parametrize(("recipe", "pattern"), [(reward_model, "reward_model_*"), (ppo, "ppo_*")])
def test_the_shipped_configs_are_accepted(recipe, pattern):
    (path,) = CONFIGS.glob(f"{pattern}.yaml")
    config = load(recipe.Config, ["--config", str(path)])
    assert config.output_dir == f"runs/{path.stem}"
    if recipe is ppo:
        assert config.max_steps % (config.epochs * config.minibatches) == 0
        assert config.save_steps % (config.epochs * config.minibatches) == 0
        assert config.reward_model == "runs/reward_model_qwen3_0.6b/model"


@pytest.mark.parametrize("recipe", [reward_model, ppo])
def test_without_flags_they_start_from_the_sft_model_and_the_shipped_pairs(recipe):
    config = recipe.Config()
    assert (ROOT / config.dataset).is_file()
    assert config.output_dir == f"runs/{recipe.__name__.rpartition('.')[2]}"
