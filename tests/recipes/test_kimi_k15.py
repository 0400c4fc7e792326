"""recipes/kimi_k15.py: it trains, its settings reach the trainer, and what does not fit is said."""

import json
from functools import partial

import pytest

from posttrain.errors import ConfigError
from posttrain.trainers.callbacks import OptimizerReset
from recipes import kimi_k15
from tests.recipes.conftest import run


@pytest.fixture(scope="module")
def train(base_run, memorised, tmp_path_factory):
    """Four steps, two iterations, on the memorised problem, from the tiny base."""
    folder = tmp_path_factory.mktemp("kimi")
    rows = [
        {"question": memorised[1].question, "answer": memorised[1].answer, "level": level}
        for level in range(12)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 16}
    return partial(
        run, kimi_k15, model_name_or_path=base_run.model, dataset=str(folder / "problems.jsonl"),
        num_generations=8, max_completion_length=40, tokens_per_rollout=20, **few,
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["sequence", "token"])
def test_it_trains_on_answers_that_take_two_iterations(loss, train, tmp_path):
    found = train(tmp_path / "run", loss=loss, length_start_step=2, max_staleness=1, max_steps=6)
    assert len(found.metrics) == 6
    assert any(record["grad_norm"] > 0 for record in found.metrics)
    # The length reward is 0 in the iterations that begin before step 2, and then it is not.
    lengths = [record["length"] for record in found.metrics if "length" in record]
    assert lengths[-1] != 0
    assert min(r["on_policy_tokens"] for r in found.metrics if "on_policy_tokens" in r) < 1
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_settings_reach_the_trainer(train, tmp_path):
    trainer = train(
        tmp_path / "run", tau=0.5, length_weight=0.0, loop_tokens=9, loop_penalty=0.3,
        max_staleness=2, priority_floor=0.3, success_prior=0.4, difficulty="level",
        curriculum_steps=7,
    ).trainer  # fmt: skip
    assert trainer.objective.loss.keywords == {"tau": 0.5}
    assert trainer.objective.per == "sequence"
    assert set(trainer.rollouts.rewards) == {"accuracy", "format", "loop"}
    assert trainer.rollouts.rewards["loop"][1] == 0.3
    assert trainer.rollouts.rewards["loop"][0].keywords == {"num_tokens": 9}
    assert vars(trainer.rollouts.parts) == {
        "tokens_per_rollout": 20, "max_staleness": 2, "loop_tokens": 9,
    }  # fmt: skip
    sampler = trainer.rollouts.prompt_sampler
    assert (sampler.floor, sampler.curriculum.rollouts) == (0.3, 4)  # 7 steps, two an iteration
    assert sampler.curriculum.rows == list(range(12))
    unseen = [rate for row, rate in enumerate(sampler.rates.tolist()) if row not in sampler.found]
    assert set(unseen) == {0.4}
    (reset,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, OptimizerReset)]
    assert reset.every == 2


def test_pass_rates_are_kept_beside_the_runs(train, tmp_path):
    """A second run of the same model and data reads them."""
    said = [
        train(tmp_path / name, pass_rate_generations=2, curriculum_steps=4).said
        for name in ("first", "second")
    ]
    assert "pass rates of 12 prompts, 2 completions each" in said[0]
    assert "pass rates read from" in said[1]
    assert len(list((tmp_path / "pass_rates").iterdir())) == 1


def test_settings_that_need_another_one_are_refused(train, tmp_path):
    with pytest.raises(ConfigError, match="--loop_penalty: expected --loop_tokens"):
        train(tmp_path / "run", loop_penalty=1.0, loop_tokens=0)
    with pytest.raises(ConfigError, match="a curriculum needs to know what is easy"):
        train(tmp_path / "run", curriculum_steps=4)
    with pytest.raises(ConfigError, match="no column 'levle'"):
        train(tmp_path / "run", curriculum_steps=4, difficulty="levle", pass_rate_generations=2)
    with pytest.raises(ConfigError, match="is for a curriculum"):
        train(tmp_path / "run", difficulty="level", pass_rate_generations=2)
    with pytest.raises(ConfigError, match="max_staleness 1: expected tokens_per_rollout below"):
        train(tmp_path / "run", max_staleness=1, tokens_per_rollout=40)
    data = tmp_path / "problems.jsonl"
    rows = [{"question": "1 + 1?", "answer": "2", "pass_rate": 0.5}] * 12
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="without a column 'pass_rate'"):
        train(tmp_path / "run", pass_rate_generations=2, dataset=str(data))
    assert not (tmp_path / "run").exists()
