"""Quickstart: base model, SFT, DPO and R1-Zero in turn, on a CPU, to held-out problems solved.

    make quickstart [SEED=1]        or: python recipes/quickstart.py --seed 1

It runs the recipes with their defaults, loads each saved model fresh from disk and evaluates it on
the held-out problems with the rewards that RL trains with. It writes the run folders and
runs/quickstart/summary.json.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import base
import dpo
import r1_zero
import sft

from posttrain.run.folder import write_whole
from posttrain.run.options import option, parse, plain_errors, say
from posttrain.run.shipped import shipped_path, use_shipped

HELD_OUT = "data/heldout.jsonl"
MAX_TOKENS = 64  # of a completion; a right one has about 35
TEMPERATURE = 0.6  # as DeepSeek-R1 was evaluated


@dataclass(kw_only=True)
class Config:
    """Settings of the quickstart."""

    seed: int = option(0, "seed of all stages", at_least=0)
    output_dir: str = option("runs/quickstart", "folder for all run folders and the summary")
    dry_run: bool = option(False, "say what each stage would do, and train nothing")


@dataclass(frozen=True)
class Stage:
    """A recipe, the prompt format that its model is evaluated with, and what it shows."""

    name: str
    template: str
    what: str


STAGES = (
    Stage("base", "r1_zero", "untrained LLaMA, 0.5M -> plain language model of hasty sums"),
    Stage("sft", "alpaca", "base -> answers instructions, by the same writers"),
    Stage("dpo", "alpaca", "sft -> prefers right answers to wrong ones"),
    Stage("r1_zero", "r1_zero", "base -> RL from rule rewards alone, no SFT"),
)
RECIPES = {"base": base, "sft": sft, "dpo": dpo, "r1_zero": r1_zero}
STARTS_FROM = {"sft": "base", "dpo": "sft", "r1_zero": "base"}


def main(config: Config) -> dict:
    """Run all stages, and return the content of summary.json; nothing by --dry_run."""
    root = Path(config.output_dir)
    folder = {stage.name: str(root / stage.name) for stage in STAGES}
    say(f"quickstart, seed {config.seed}: four stages, each evaluated on held-out problems")
    if config.dry_run:
        describe(config)
        return {}
    results = []
    for stage in STAGES:
        say(f"\n{stage.name:8}{stage.what}")
        start = time.monotonic()
        model = f"{folder[STARTS_FROM[stage.name]]}/model" if stage.name in STARTS_FROM else None
        RECIPES[stage.name].main(settings_of(stage, config, model))
        results.append(judge(stage, folder[stage.name], time.monotonic() - start))
    summary = {"seed": config.seed, "stages": results}
    path = root / "summary.json"
    write_whole(path, json.dumps(summary, indent=2) + "\n")
    say(table(results, folder))
    return summary


def settings_of(stage: Stage, config: Config, model: str | None) -> Any:
    """Return the settings of a stage's recipe. model: the folder to start from; None: its own."""
    folder = str(Path(config.output_dir) / stage.name)
    settings = RECIPES[stage.name].Config(
        output_dir=folder, seed=config.seed, dry_run=config.dry_run
    )
    if model is not None:
        settings = replace(settings, model_name_or_path=model)
    if stage.name == "r1_zero":
        settings = replace(settings, rollout="hf")  # vLLM starts longer than this trains
    use_shipped(settings)
    return settings


def describe(config: Config) -> None:
    """Say what each stage would do; the base model, untrained, stands for all models."""
    with TemporaryDirectory() as untrained:
        for stage in STAGES:
            say(f"\n{stage.name:8}{stage.what}")
            model = untrained if stage.name in STARTS_FROM else None
            trainer = RECIPES[stage.name].main(settings_of(stage, config, model))
            if model is None:
                trainer.model.save_pretrained(untrained)
                trainer.processing_class.save_pretrained(untrained)


def judge(stage: Stage, folder: str, seconds: float) -> dict:
    """Evaluate the saved model: one completion per held-out problem, sampled as for DeepSeek-R1."""
    from posttrain.commands.evaluate import evaluate_model
    from posttrain.rewards.format import think_answer_format
    from posttrain.rewards.math import math_reward

    start = time.monotonic()
    found = evaluate_model(
        f"{folder}/model",
        shipped_path(HELD_OUT),
        rewards={"accuracy": (math_reward, 1.0), "format": (think_answer_format, 1.0)},
        template=stage.template,
        max_tokens=MAX_TOKENS,
        temperature=TEMPERATURE,
    )
    took = time.monotonic() - start
    say(
        f"held out: accuracy {found['accuracy']:.1%}, format {found['format']:.1%}, "
        f"mean completion tokens {found['mean_completion_tokens']:.0f} ({took:.0f} s)"
    )
    return {
        "name": stage.name,
        "accuracy": found["accuracy"],
        "format": found["format"],
        "mean_completion_tokens": found["mean_completion_tokens"],
        "seconds": round(seconds + took, 1),
    }


def table(results: list[dict], folder: dict[str, str]) -> str:
    """Format the results, one line per stage."""
    lines = [
        "",
        f"{'stage':10}{'accuracy':>10}{'format':>10}{'tokens':>9}{'seconds':>9}  run folder",
    ]
    for result in results:
        name = result["name"]
        lines.append(
            f"{name:10}{result['accuracy']:>10.1%}{result['format']:>10.1%}"
            f"{result['mean_completion_tokens']:>9.1f}{result['seconds']:>9.0f}  {folder[name]}"
        )
    total = sum(result["seconds"] for result in results)
    how = f"One completion per held-out problem, at temperature {TEMPERATURE}"
    lines.append(f"\n{how}; {total:.0f} seconds in all.")
    return "\n".join(lines)


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
