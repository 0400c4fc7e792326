"""Labels of single completions and of steps, from settings to saved models and their use."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from posttrain import cli
from posttrain.run.options import load
from recipes import grpo, kto, prm, rejection_sampling
from tests.recipes.conftest import Run, run


@pytest.fixture(scope="module")
def judge(base_run, first_rows) -> Run:
    """A process reward model, trained on few steps."""
    return run(
        prm, base_run.folder.parent / "prm", model_name_or_path=base_run.model, max_steps=4,
        dataset=first_rows("steps", 24), eval_dataset=first_rows("steps", 8), eval_steps=4,
        step_separator=" ", per_device_train_batch_size=8, learning_rate=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["kto", "bco", "apo_zero"])
def test_kto_tells_good_completions_from_bad(loss, base_run, first_rows, tmp_path):
    done = run(
        kto, tmp_path / loss, loss=loss, model_name_or_path=base_run.model, max_steps=3,
        dataset=first_rows("preferences", 8), per_device_train_batch_size=16, learning_rate=1e-3,
    )  # fmt: skip
    first, *_, last = done.metrics
    assert last["desirable_log_ratio"] > last["undesirable_log_ratio"]
    assert first["desirable_log_ratio"] == pytest.approx(0, abs=1e-4)  # the policy is the reference
    assert last["loss"] < first["loss"]
    start = AutoModelForCausalLM.from_pretrained(base_run.model).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(done.model).state_dict()
    assert not torch.equal(saved["lm_head.weight"], start["lm_head.weight"])
    assert load(kto.Config, ["--config", str(done.folder / "config.yaml")]) == done.config


def test_the_process_reward_model_is_saved_as_a_token_classifier_with_its_separator(judge):
    assert judge.metrics[-1]["loss"] < judge.metrics[0]["loss"]
    text = (judge.folder / "metrics.jsonl").read_text()
    assert any("eval_label_accuracy" in record for record in map(json.loads, text.splitlines()))
    saved = AutoModelForTokenClassification.from_pretrained(judge.model).state_dict()
    trained = judge.trainer.model.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in saved.items())
    assert json.loads(Path(judge.model, "steps.json").read_text()) == {"separator": " "}


def test_grpo_is_rewarded_step_by_step(judge, base_run, first_rows, tmp_path):
    """The logged reward is the aggregate of the steps' probabilities; rules are logged beside."""
    done = run(
        grpo, tmp_path / "grpo", prm=judge.model, model_name_or_path=base_run.model, max_steps=2,
        dataset=first_rows("problems", 4), num_generations=4, per_device_train_batch_size=8,
        max_completion_length=24, reward_workers=0, learning_rate=1e-3,
    )  # fmt: skip
    for record in done.metrics:
        assert record["reward"] == pytest.approx(record["process"])
        assert 0 < record["process"] < 1
        assert {"accuracy", "format"} <= record.keys()
        assert record["grad_norm"] > 0


@pytest.mark.parametrize("aggregate", ["min", "product"])
def test_rejection_sampling_keeps_what_the_process_reward_model_scores_highest(
    aggregate, judge, base_run, first_rows, tmp_path
):
    report = rejection_sampling.main(
        rejection_sampling.Config(
            dataset=first_rows("problems", 3), model_name_or_path=base_run.model,
            template="r1_zero", prm=judge.model, prm_aggregate=aggregate, num_generations=4,
            max_completion_length=40, output_dir=str(tmp_path / "run"), min_margin=0.0,
        )
    )  # fmt: skip
    lines = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    groups = [json.loads(line) for line in lines]
    assert [len(group["answers"]) for group in groups] == [4] * 3
    records = map(json.loads, (tmp_path / "run" / "records.jsonl").read_text().splitlines())
    kept = {record["prompt"]: record for record in records}
    assert kept
    assert report["records"] == len(kept)
    for group in groups:
        whole = [a["reward"] for a in group["answers"] if a["finish_reason"] == "stop"]
        if whole:
            assert kept[group["prompt"]]["reward"] == max(whole)
        assert all(0 < a["reward"] == a["parts"]["score"] < 1 for a in group["answers"])


def test_evaluate_chooses_the_best_sample_by_the_process_reward_model(
    judge, base_run, first_rows, capsys
):
    cli.main(
        ["evaluate", base_run.model, "--dataset", first_rows("problems", 4), "--num_samples", "3",
         "--prm", judge.model, "--max_completion_length", "40"]
    )  # fmt: skip
    shown = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert {"pass@2", "pass@3", "maj@3", "best_of_2", "best_of_3"} <= shown.keys()
    assert float(shown["best_of_3"][:-1]) <= float(shown["pass@3"][:-1])
