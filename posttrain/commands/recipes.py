"""`posttrain recipes` and `posttrain run`: the recipes, listed and started, without a checkout.

    posttrain recipes
    posttrain run dpo --loss ipo --max_steps 10
    accelerate launch -m posttrain.cli run sft --config recipes/configs/sft_llama_3.2_1b.yaml

A recipe runs as `python recipes/NAME.py` does, with the same flags. Where the working folder has no
`data` or `recipes/configs`, paths that begin so mean the shipped files.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.run.shipped import first_line, recipe_file, recipe_names, shipped_root
from posttrain.run.sources import did_you_mean

USAGE = "usage: posttrain run RECIPE --SETTING VALUE …   (posttrain run RECIPE --help says more)"


def owner_of(config: Path) -> str | None:
    """Return the recipe that a config's file name begins with."""
    owners = [name for name in recipe_names() if config.name.startswith(f"{name}_")]
    return max(owners, key=len, default=None)


def configs_of(name: str) -> list[str]:
    """List the shipped configs of a recipe, as paths to write behind `--config`."""
    found = sorted((shipped_root() / "recipes" / "configs").glob("*.yaml"))
    return [f"recipes/configs/{path.name}" for path in found if owner_of(path) == name]


def list_recipes(argv: Sequence[str]) -> None:
    """Print each recipe with its first line and its configs, and the folder they lie in."""
    if argv and argv[0] not in ("--help", "-h"):
        raise ConfigError(f"recipes: expected no argument, found '{argv[0]}'. posttrain run RECIPE")
    print(f"{USAGE}\n")
    for name in recipe_names():
        print(f"  {name:20}{first_line(name)}")
        for config in configs_of(name):
            print(f"  {'':20}--config {config}")
    print(f"\nThey are in {shipped_root() / 'recipes'}; copy one and change it.")


def run_recipe(argv: Sequence[str]) -> None:
    """Run the recipe that `argv` names first, with the rest as its flags.

    Raises ConfigError for a recipe that is not there.
    """
    names = recipe_names()
    if not argv or argv[0] in ("--help", "-h"):
        print(f"{USAGE}\n\nrecipes: {', '.join(names)}")
        return
    name = argv[0].removeprefix("recipes/").removesuffix(".py")
    if name not in names:
        near = did_you_mean(name, names)
        raise ConfigError(f"expected a recipe ({', '.join(names)}), found '{argv[0]}'.{near}")
    script = recipe_file(name)
    sys.argv = [str(script), *argv[1:]]
    sys.path.insert(0, str(script.parent))  # as Python does for a script: recipes share files
    runpy.run_path(str(script), run_name="__main__")
