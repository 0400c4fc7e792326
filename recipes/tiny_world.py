"""Recipes that start from another recipe's model: the chain of the tiny world.

A recipe whose default model is missing makes it first, by running the recipe that writes it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.run.console import is_main_process, say

BASE_MODEL, SFT_MODEL = "runs/base/model", "runs/sft/model"
REWARD_MODEL = "runs/reward_model/model"
LONG_MODEL, DPO_MODEL = "runs/long/model", "runs/dpo/model"
RECIPES = Path(__file__).parents[1] / "recipes"
MADE_BY = {
    BASE_MODEL: RECIPES / "base.py",
    SFT_MODEL: RECIPES / "sft.py",
    REWARD_MODEL: RECIPES / "reward_model.py",
    DPO_MODEL: RECIPES / "dpo.py",
    LONG_MODEL: RECIPES / "sft.py",
}
# Flags for a model that its recipe does not make by default.
FLAGS = {LONG_MODEL: ["--dataset", "data/checked.jsonl", "--output_dir", "runs/long"]}

# How variables of a launcher begin; the recipe that is run first is a launch of its own.
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "ACCELERATE_",
    "FSDP_",
)
WAIT_SECONDS = 3600


def make_missing(model: str) -> None:
    """Run the recipe whose default output `model` is, if that folder is not there yet."""
    recipe = MADE_BY.get(model)
    if recipe is None or _is_model(Path(model)) or not recipe.is_file():
        return
    if not is_main_process():
        _wait_for(Path(model))
        return
    say(f"{model} is missing: making it first with recipes/{recipe.name}")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)
    }
    command = [sys.executable, str(recipe), *FLAGS.get(model, ())]
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise ConfigError(f"recipes/{recipe.name} failed; {model} could not be made.")


def _wait_for(model: Path) -> None:
    """Wait until rank 0 has made the model; its folder appears whole."""
    give_up = time.monotonic() + WAIT_SECONDS
    while not _is_model(model):
        if time.monotonic() > give_up:
            raise ConfigError(f"{model} did not appear within {WAIT_SECONDS // 60} minutes.")
        time.sleep(0.5)


def _is_model(folder: Path) -> bool:
    """True for a folder with a whole model or a LoRA adapter."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
