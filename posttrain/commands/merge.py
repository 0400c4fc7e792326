"""`posttrain merge`: merge models with the same shapes into one.

    posttrain merge --models runs/long/model runs/short/model --output_dir runs/merged
    posttrain merge --models A B --method slerp --weights 0.3 --output_dir merged
    posttrain merge --models A B --base BASE --method task_arithmetic --weights 1 -0.5 …

Formulas: posttrain/models/merge.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors, say


@dataclass(kw_only=True)
class Config:
    """Settings of one merge."""

    models: list[str] = option(help="folders of the models, with safetensors")
    output_dir: str = option(help="folder for the merged model; must not exist")
    method: Literal["linear", "slerp", "task_arithmetic"] = option(
        "linear", "how to combine the weights"
    )
    weights: list[float] = option(
        [], "linear, task_arithmetic: one for each model, none: equal; slerp: share of the second"
    )
    base: str | None = option(
        None, "folder of the model that the others were trained from, for task_arithmetic"
    )

    def check(self) -> None:
        """Raise ConfigError for models, weights or a base that do not fit the method."""
        count, found = len(self.models), len(self.weights)
        if count < 2 and self.method != "task_arithmetic":
            raise ConfigError(f"models: expected at least two, found {count}.")
        if (self.base is not None) != (self.method == "task_arithmetic"):
            raise ConfigError("base: expected with --method task_arithmetic, and only there.")
        if self.method == "slerp" and (count != 2 or found > 1):
            raise ConfigError(
                f"slerp: expected two models and one weight; found {count} and {found}."
            )
        if self.method != "slerp" and found not in (0, count):
            raise ConfigError(f"weights: expected one for each model ({count}), found {found}.")


def main(argv: Sequence[str]) -> None:
    """Merge as the flags in `argv` say."""
    config = parse(Config, argv)
    with plain_errors():
        run(config, argv)


def run(config: Config, argv: Sequence[str]) -> None:
    """Write the merged model and its card, which quotes the flags."""
    from posttrain.models.merge import linear, merge_models, slerp, task_arithmetic

    count = len(config.models)
    models = list(config.models)
    if config.method == "linear":
        combine = partial(linear, weights=config.weights or [1 / count] * count)
    elif config.method == "slerp":
        combine = partial(slerp, t=(config.weights or [0.5])[0])
    else:
        combine = partial(task_arithmetic, weights=config.weights or [1.0] * count)
        models = [config.base, *models]
    number = merge_models(models, config.output_dir, combine)
    command = shlex.join(["posttrain", "merge", *argv])
    (Path(config.output_dir) / "README.md").write_text(
        f"---\nlibrary_name: transformers\ntags: [posttrain, merge]\n---\n\n"
        f"# {Path(config.output_dir).name}\n\n- merged from: {', '.join(models)}\n"
        f"- command: `{command}`\n",
        encoding="utf-8",
    )
    said = " ".join(f"{keyword}={value}" for keyword, value in combine.keywords.items())
    say(f"merged  {', '.join(models)}: {number} tensors, {config.method} {said}")
    say(f"model   saved to {config.output_dir}")
