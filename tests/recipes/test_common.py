"""A recipe whose default input is missing makes it first, once, in a process of its own."""

import json
import os
import threading
import time
from pathlib import Path

import common as stages
import pytest
from common import make_missing

from posttrain.errors import ConfigError
from posttrain.run.options import load

MODEL = "runs/fake/model"
# Stands in for a recipe: keeps its environment, writes the model's folder.
RECIPE = f"""
import json, os, pathlib, sys
folder = pathlib.Path("{MODEL}")
folder.mkdir(parents=True)
(folder / "config.json").write_text(json.dumps({{**os.environ, "FLAGS": " ".join(sys.argv[1:])}}))
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch) -> Path:
    """A fake recipe that makes MODEL in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "fake.py"
    path.write_text(RECIPE)
    monkeypatch.setattr(stages, "MADE_BY", {MODEL: path})
    return path


def test_a_missing_default_is_made_by_its_recipe_and_said_in_one_line(capfd):
    make_missing(MODEL)
    assert Path(MODEL, "config.json").is_file()
    said = f"{MODEL} is missing: making it first with recipes/fake.py\n"
    assert capfd.readouterr() == (said, "")


def test_a_recipe_gets_the_flags_that_its_model_needs(monkeypatch):
    monkeypatch.setattr(stages, "FLAGS", {MODEL: ["--dataset", "some.jsonl"]})
    make_missing(MODEL)
    assert (
        json.loads(Path(MODEL, "config.json").read_text())["FLAGS"]
        == "--resume --dataset some.jsonl"
    )


def test_what_is_there_is_not_made_again(recipe, capfd):
    make_missing(MODEL)
    capfd.readouterr()
    recipe.write_text("raise SystemExit(1)")
    make_missing(MODEL)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model", ["runs/other/model", "owner/name", "fake"])
def test_a_model_that_no_recipe_makes_is_left_to_the_loader(model, capfd):
    make_missing(model)
    assert not Path("runs").exists()
    assert capfd.readouterr() == ("", "")


def test_the_recipe_run_first_knows_nothing_of_the_launch_it_is_part_of(monkeypatch):
    launch = {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500", "ACCELERATE_USE_DEEPSPEED": "true", "TORCHELASTIC_RUN_ID": "x",
        "FSDP_VERSION": "2", "GROUP_RANK": "0", "ROLE_RANK": "0", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    for name, value in {**launch, "MY_OWN": "kept"}.items():
        monkeypatch.setenv(name, value)
    make_missing(MODEL)
    seen = json.loads(Path(MODEL, "config.json").read_text())
    assert seen.keys() & launch.keys() == set()
    assert seen["MY_OWN"] == "kept"
    assert os.environ["RANK"] == "0"


def test_a_recipe_that_fails_is_an_error_that_names_it(recipe):
    recipe.write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match=r"recipes/fake\.py failed; runs/fake/model could not"):
        make_missing(MODEL)


def test_other_ranks_wait_for_the_model_and_make_nothing(recipe, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    recipe.write_text("raise SystemExit(1)")

    def appear():
        time.sleep(0.2)
        Path(MODEL).mkdir(parents=True)
        Path(MODEL, "config.json").write_text("{}")

    thread = threading.Thread(target=appear)
    thread.start()
    make_missing(MODEL)
    assert Path(MODEL, "config.json").is_file()
    thread.join()
    assert capfd.readouterr() == ("", "")


def test_other_ranks_do_not_wait_for_ever(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(stages, "WAIT_SECONDS", -1)
    with pytest.raises(ConfigError, match="did not appear"):
        make_missing(MODEL)


def test_the_defaults_of_the_recipes_are_the_chain_that_stages_know(monkeypatch):
    monkeypatch.undo()
    from recipes import (
        base,
        dpo,
        long2short,
        ppo,
        prm,
        r1_zero,
        rejection_sampling,
        reward_model,
        sft,
    )

    makers = {
        stages.BASE_MODEL: base, stages.SFT_MODEL: sft, stages.REWARD_MODEL: reward_model,
        stages.DPO_MODEL: dpo, stages.LONG_MODEL: sft, stages.PRM: prm,
    }  # fmt: skip
    assert set(stages.MADE_BY) == set(makers)
    for model, recipe in makers.items():
        made = load(recipe.Config, stages.FLAGS.get(model, []))
        assert f"{made.output_dir}/model" == model
        assert Path(stages.RECIPES.parent, made.dataset).is_file()
        assert stages.MADE_BY[model].samefile(recipe.__file__)
    for recipe in (sft, r1_zero):
        assert recipe.Config().model_name_or_path == stages.BASE_MODEL
    for recipe in (dpo, reward_model, ppo, rejection_sampling):
        assert recipe.Config().model_name_or_path == stages.SFT_MODEL
    assert ppo.Config().reward_model == stages.REWARD_MODEL
    assert long2short.Config().model_name_or_path == stages.LONG_MODEL
    assert long2short.Config().short_model == stages.DPO_MODEL
