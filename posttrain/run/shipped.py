"""Files that ship with the package: recipes, their configs, data, and accelerate's configs.

    shipped_path("data/sft.jsonl")     # where that file is, from any working folder
    recipe_names()                     # ["base", "distill", "dpo", …]

A wheel carries them below `posttrain/_shipped`; a checkout has them in its root.
"""

from __future__ import annotations

import ast
from collections.abc import Collection
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
FOLDERS = ("data", "recipes", "accelerate_configs")
# Shipped data -> rows that no shipped training file holds, for evaluation.
HELD_OUT = {
    "data/sft.jsonl": "data/sft_heldout.jsonl",
    "data/preferences.jsonl": "data/preferences_heldout.jsonl",
    "data/problems.jsonl": "data/heldout.jsonl",
}


def shipped_root() -> Path:
    """Return the folder that holds `recipes`, `data` and `accelerate_configs`."""
    installed = PACKAGE / "_shipped"
    return installed if installed.is_dir() else PACKAGE.parent


def shipped_path(name: str) -> str:
    """Return `name`, or the shipped file of that name where the working folder has none.

    Only names such as `data/sft.jsonl`, which begin with one of FOLDERS, are looked for.
    """
    if name.partition("/")[0] not in FOLDERS or Path(name).exists():
        return name
    found = shipped_root() / name
    return str(found) if found.exists() else name


def use_shipped(config: object, written: Collection[str] = ()) -> None:
    """Let each setting that names a shipped file, and only that, point to it: see shipped_path.

    A run on shipped data is also held out from (see hold_out), unless a setting of evaluations is
    among those that somebody has written.
    """
    if not {"eval_dataset", "eval_steps"} & set(written):
        hold_out(config)
    for name, value in vars(config).items():
        if isinstance(value, str):
            setattr(config, name, shipped_path(value))
        elif isinstance(value, list):
            setattr(config, name, [shipped_path(v) if isinstance(v, str) else v for v in value])


def hold_out(config: object) -> None:
    """Let a run on shipped data be measured on held-out rows, before the first step and at the end.

    Not where a recipe evaluates at other steps by default.
    """
    if not hasattr(config, "eval_dataset") or getattr(config, "eval_steps", None) != 0:
        return
    held_out, steps = HELD_OUT.get(config.dataset), config.max_steps
    if held_out and steps > 0:
        config.eval_dataset, config.eval_steps = held_out, steps


def recipe_names() -> list[str]:
    """List the recipes: the files of `recipes` that can be run, without their suffix."""
    files = sorted((shipped_root() / "recipes").glob("*.py"))
    return [file.stem for file in files if "\nif __name__ ==" in file.read_text(encoding="utf-8")]


def recipe_file(name: str) -> Path:
    """Return the file of the recipe with this name."""
    return shipped_root() / "recipes" / f"{name}.py"


def first_line(name: str) -> str:
    """Return the sentence that a recipe's file opens with."""
    text = ast.get_docstring(ast.parse(recipe_file(name).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]
