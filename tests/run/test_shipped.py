"""A run on shipped data is measured on shipped held-out rows, unless somebody says how."""

import pytest

from posttrain.run.options import load
from posttrain.run.shipped import HELD_OUT
from recipes import dpo, grpo, reward_model, sft


@pytest.mark.parametrize("recipe", [sft, dpo, reward_model, grpo])
def test_a_run_without_arguments_is_measured_before_and_after(recipe, monkeypatch):
    monkeypatch.chdir(recipe.__file__.rpartition("/recipes/")[0])
    config = load(recipe.Config, [])
    assert config.eval_dataset == HELD_OUT[config.dataset]
    assert config.eval_steps == config.max_steps > 0


@pytest.mark.parametrize(
    ("flags", "data", "steps"),
    [
        (["--dataset", "mine.jsonl"], None, 0),
        (["--eval_dataset", "mine.jsonl"], "mine.jsonl", 0),
        (["--eval_dataset", "mine.jsonl", "--eval_steps", "7"], "mine.jsonl", 7),
        (["--max_steps", "-1"], None, 0),
        (["--eval_steps", "0"], None, 0),
    ],
)
def test_what_somebody_has_set_stays(flags, data, steps):
    config = load(dpo.Config, flags)
    assert (config.eval_dataset, config.eval_steps) == (data, steps)


def test_rl_on_shipped_problems_without_held_out_ones_stays_without():
    assert load(grpo.Config, ["--eval_dataset", "None"]).eval_steps == 0
