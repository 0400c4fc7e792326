"""recipes/trpo.py: it trains within its bound, and other optimizers' settings are refused."""

import json

import pytest

from posttrain.errors import ConfigError
from posttrain.run.options import load
from posttrain.trainers.trpo import TrustRegion
from recipes import trpo
from tests.recipes.conftest import ROOT, run


def test_it_trains_within_the_bound(base_run, memorised, tmp_path):
    row = {"question": memorised[1].question, "answer": memorised[1].answer}
    (tmp_path / "problems.jsonl").write_text((json.dumps(row) + "\n") * 4)
    found = run(
        trpo, tmp_path / "run", model_name_or_path=base_run.model, num_generations=8,
        dataset=str(tmp_path / "problems.jsonl"), per_device_train_batch_size=16, max_steps=2,
        max_completion_length=40, max_kl=0.01, cg_iterations=3, max_backtracks=7, shrink=0.5,
    )  # fmt: skip
    assert all(record["step_kl"] <= 0.01 for record in found.metrics)
    assert any(record["step_gain"] > 0 for record in found.metrics)
    expected = TrustRegion(max_kl=0.01, damping=0.01, cg_iterations=3, shrink=0.5, max_backtracks=7)
    assert found.trainer.region == expected
    assert (tmp_path / "run/model/model.safetensors").is_file()


@pytest.mark.parametrize("flag", trpo.OF_OTHER_OPTIMIZERS)
def test_a_setting_of_other_optimizers_is_refused(flag):
    value = "linear" if flag == "lr_scheduler_type" else "0.5"
    with pytest.raises(ConfigError, match="TRPO does not use this setting"):
        load(trpo.Config, [f"--{flag}", value])


@pytest.mark.parametrize("name", trpo.UNDER_TRAINER)
def test_and_so_is_one_under_trainer(name, tmp_path):
    value = {"optim": "sgd", "optim_args": "a", "lr_scheduler_kwargs": "{a: 1}"}.get(name, 1)
    (tmp_path / "trpo.yaml").write_text(f"trainer: {{{name}: {value}}}\n")
    with pytest.raises(ConfigError, match=f"trainer.{name}: .*TRPO does not use this setting"):
        load(trpo.Config, ["--config", str(tmp_path / "trpo.yaml")])


def test_without_flags_it_starts_from_the_base_model_and_the_shipped_problems():
    config = load(trpo.Config, [])
    assert (ROOT / config.dataset).is_file()
    assert (config.model_name_or_path, config.output_dir) == ("runs/base/model", "runs/trpo")
    assert config.dtype == "float32"
