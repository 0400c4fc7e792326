"""recipes/grpo.py: every algorithm of its table trains, and its settings reach the trainer."""

import json
from functools import partial

import pytest

from posttrain.errors import ConfigError
from posttrain.rollouts.options import Selection
from posttrain.run.options import load
from posttrain.trainers.callbacks import KLGuard, ReferenceSync
from recipes import grpo
from tests.recipes.conftest import run


@pytest.fixture(scope="module")
def train(base_run, memorised, tmp_path_factory):
    """Two steps on the memorised problem, from the tiny base."""
    folder = tmp_path_factory.mktemp("grpo")
    row = {"question": memorised[1].question, "answer": memorised[1].answer}
    (folder / "problems.jsonl").write_text((json.dumps(row) + "\n") * 4)
    few = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 16}
    return partial(
        run, grpo, model_name_or_path=base_run.model, dataset=str(folder / "problems.jsonl"),
        num_generations=8, max_completion_length=40, **few,
    )  # fmt: skip


# One for each mean over tokens, and for each kind of advantage; test_grpo_learns has them all.
@pytest.mark.parametrize("algorithm", ["gspo", "dr_grpo", "dapo", "reinforce_pp", "kimi"])
def test_an_algorithm_of_the_table_trains(algorithm, train, tmp_path):
    found = train(tmp_path / "run", algorithm=algorithm, updates_per_rollout=2)
    assert len(found.metrics) == 2
    assert any(record["grad_norm"] > 0 for record in found.metrics)
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_settings_reach_the_trainer(train, tmp_path):
    trainer = train(
        tmp_path / "run", algorithm="dapo", clip_low=0.1, beta=0.1, reference_sync_steps=1,
        max_step_kl=0.5, max_refills=2, drop_truncated=True, overlong_tokens=8, top_k=20,
        correction="icepop", kl="k2", entropy_coef=0.01,
    ).trainer  # fmt: skip
    objective, rollouts = trainer.objective, trainer.rollouts
    assert objective.loss.keywords == {"clip_low": 0.1, "clip_high": 0.28}
    assert (objective.beta, objective.kl.__name__) == (0.1, "kl_k2")
    assert (rollouts.options.reward_kl_coef, objective.entropy_coef) == (0, 0.01)
    assert objective.per == "token"
    assert rollouts.options.selection == Selection(2, "accuracy", drop_truncated=True)
    assert trainer.objective.correction.__name__ == "icepop_weights"
    assert trainer.sampling.top_k == 20
    assert set(trainer.rollouts.rewards) == {"accuracy", "format", "overlong"}
    kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert {KLGuard, ReferenceSync} <= kinds


def test_k1_goes_into_the_reward_and_the_threshold_into_the_off_policy_mask(train, tmp_path):
    """A threshold that nothing reaches changes nothing."""
    settings = {"algorithm": "reinforce_pp", "kl": "k1", "beta": 0.05, "updates_per_rollout": 2}
    plain = train(tmp_path / "plain", **settings)
    masked = train(tmp_path / "masked", off_policy_threshold=1e9, **settings)
    assert plain.trainer.objective.beta == 0
    assert plain.trainer.rollouts.options.reward_kl_coef == 0.05
    assert plain.metrics[0]["kl_per_completion"] < 1e-3
    assert plain.trainer.objective.off_policy_mask is None
    assert masked.trainer.objective.off_policy_mask.keywords == {"threshold": 1e9}
    assert masked.metrics[1]["loss"] == plain.metrics[1]["loss"]


def test_an_estimate_of_a_kl_that_has_no_weight_is_refused():
    with pytest.raises(ConfigError, match="--kl: expected --beta above 0 with k2, found 0"):
        load(grpo.Config, ["--kl", "k2"])
    assert load(grpo.Config, ["--kl", "k2", "--beta", "0.1"]).kl == "k2"


def test_a_setting_that_the_algorithm_does_not_have_is_an_error(train, tmp_path):
    with pytest.raises(ConfigError, match="--tau: clipped_policy_loss has no such setting"):
        train(tmp_path / "run", tau=0.1)
    assert not (tmp_path / "run").exists()


def test_a_users_reward_trains_and_a_misspelt_one_ends_at_once(train, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(completions, *, answer, **_):\n"
        "    return [1 / (1 + len(text)) for text in completions]\n"
    )
    found = train(tmp_path / "run", reward=f"{tmp_path}/mine.py:short")
    assert all(0 < record["accuracy"] < 1 for record in found.metrics)
    with pytest.raises(ConfigError, match="it has short"):
        train(tmp_path / "run2", reward=f"{tmp_path}/mine.py:shrot")
