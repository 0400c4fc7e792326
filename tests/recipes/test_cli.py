"""Each recipe's command line as a child process: in one line, and without importing torch."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, get_args

import pytest

from posttrain.run.options import load
from recipes import (
    base,
    distill,
    dpo,
    grpo,
    kimi_k15,
    kto,
    long2short,
    medusa,
    mtp,
    online_dpo,
    ppo,
    prm,
    r1,
    r1_zero,
    rejection_sampling,
    reward_model,
    self_instruct,
    sft,
    trpo,
)
from tests.recipes.conftest import ROOT

RECIPES = {
    "base": base, "sft": sft, "dpo": dpo, "r1_zero": r1_zero, "grpo": grpo, "trpo": trpo,
    "kimi_k15": kimi_k15, "kto": kto, "prm": prm, "online_dpo": online_dpo,
    "reward_model": reward_model, "ppo": ppo, "self_instruct": self_instruct,
    "rejection_sampling": rejection_sampling,
    "long2short": long2short, "distill": distill, "r1": r1,
    "medusa": medusa, "mtp": mtp,
}  # fmt: skip
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
HELP_LINES = 148

# Runs a recipe as `python recipes/x.py` would, then says which heavy libraries it had loaded.
CHILD = """
import atexit, runpy, sys
heavy = ("torch", "transformers", "numpy", "datasets", "accelerate", "tokenizers")
atexit.register(lambda: print("HEAVY", *(name for name in heavy if name in sys.modules)))
sys.argv = sys.argv[1:]
sys.path[0] = "recipes"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Answer(NamedTuple):
    status: int
    output: list[str]
    errors: list[str]


def call(recipe: str, *flags: str) -> Answer:
    command = [sys.executable, "-c", CHILD, f"recipes/{recipe}.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    *output, heavy = done.stdout.splitlines()
    assert heavy == "HEAVY", heavy
    return Answer(done.returncode, output, done.stderr.splitlines())


@pytest.mark.parametrize("recipe", [*RECIPES, "quickstart"])
def test_help_is_short_loads_no_torch_and_names_every_flag(recipe):
    answer = call(recipe, "--help")
    assert (answer.status, answer.errors) == (0, [])
    assert len(answer.output) < HELP_LINES
    text = "\n".join(answer.output)
    if recipe in RECIPES:
        names = set(vars(RECIPES[recipe].Config())) - {
            "trainer",
            "settings",
            "glossary",
        }  # YAML only
        assert [name for name in names if f"--{name}" not in text] == []


def test_the_table_of_dpo_losses_and_the_choices_of_its_flag_are_the_same():
    assert tuple(dpo.losses()) == get_args(dpo.LossName)


def test_the_table_of_kto_losses_and_the_choices_of_its_flag_are_the_same():
    assert tuple(kto.losses()) == get_args(kto.LossName)


def test_the_table_of_online_dpo_losses_and_the_choices_of_its_flag_are_the_same():
    assert tuple(online_dpo.losses()) == get_args(online_dpo.LossName)


FLAGS = [
    ("online_dpo", ["--reward_model", "a/b", "--reward", "code"], "reward_model: expected one"),
    ("kto", ["--loss", "bco", "--desirable_weight", "2"], "desirable_weight: expected --loss kto"),
    ("grpo", ["--prm", "a/b", "--algorithm", "rloo"], "prm: expected --algorithm grpo, dapo"),
    ("rejection_sampling", ["--reward_model", "a/b", "--prm", "c/d"], "prm: expected one scorer"),
    ("sft", ["--max_step", "1"], "--max_step: unknown flag. Did you mean '--max_steps'?"),
    ("r1_zero", ["--clip_hi", "4"], "--clip_hi: unknown flag. Did you mean '--clip_high'?"),
    ("base", ["--max_steps", "many"], "--max_steps: expected a whole number, found 'many'."),
    ("rejection_sampling", ["--reward_model", "a/b", "--keep", "shortest"], "min_reward: expected"),
    ("dpo", ["--loss", "robus"], "Did you mean 'robust'?"),
    ("r1_zero", ["--beta", "-1"], "--beta: expected a value at least 0, found -1.0."),
    ("sft", ["data.jsonl"], "Expected a flag such as --config FILE, found 'data.jsonl'."),
    ("sft", ["--config", "recipes/configs/nothing.yaml"], "--config: expected one YAML file"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "flags", "message"), FLAGS)
def test_a_wrong_flag_ends_with_status_2_and_one_line_that_names_it(recipe, flags, message):
    answer = call(recipe, *flags)
    assert answer.status == 2
    assert len(answer.errors) == 1
    assert message in answer.errors[0]
    assert answer.output == []


LINES = [
    ("base", "warmup_step: 1", "unknown key 'warmup_step'. Did you mean 'warmup_steps'?"),
    ("sft", "max_length: long", "max_length: expected a whole number, found 'long'."),
    ("dpo", "loss: hing", "found 'hing'. Did you mean 'hinge'?"),
    ("r1_zero", "clip_low: 2", "expected a value at most 1, found 2.0."),
    ("sft", "trainer: {optimm: sgd}", "trainer.optimm: expected a field of transformers.Train"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "line", "message"), LINES)
def test_a_wrong_yaml_line_ends_with_status_2_and_names_file_and_line(
    recipe, line, message, tmp_path
):
    path = tmp_path / "my.yaml"
    path.write_text(f"# settings\nseed: 1\n{line}\n")
    answer = call(recipe, "--config", str(path))
    assert answer.status == 2
    assert len(answer.errors) == 1
    assert answer.errors[0].startswith(f"{path}, line 3")
    assert message.removeprefix("trainer.") in answer.errors[0]


def recipe_of(config: Path) -> str:
    """`r1_zero`, not `r1`, for r1_zero_qwen2.5_1.5b.yaml."""
    return max((name for name in RECIPES if config.name.startswith(f"{name}_")), key=len)


def test_each_recipe_that_starts_from_a_model_has_a_config_for_a_real_one():
    assert {recipe_of(config) for config in CONFIGS} == {
        "sft",
        "dpo",
        "r1",
        "r1_zero",
        "reward_model",
        "ppo",
        "kto",
        "prm",
        "medusa",
        "mtp",
        "distill",
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_fits_its_recipe(config):
    recipe = RECIPES[recipe_of(config)]
    settings = load(recipe.Config, ["--config", str(config)])
    assert settings.model_name_or_path.count("/") == 1  # a model of the Hub, not the tiny one
    assert settings.model_name_or_path != recipe.Config().model_name_or_path
    assert settings.output_dir == f"runs/{config.stem}"
    assert f"--config recipes/configs/{config.name}" in config.read_text(encoding="utf-8")
