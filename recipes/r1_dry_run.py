"""`--dry_run` of recipes/r1.py: what each stage would do, as far as it can be known before.

    describe(Run(config))

Its tokens and its memory come from the recipe's own dry run. A model that no stage has made yet is
stood for by its base model, which has the same shape; records that no stage has made yet cannot be
counted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import base
import grpo
import r1_data
import r1_rewards
from r1_stages import PLANS

from posttrain.run.options import say

if TYPE_CHECKING:
    from r1_stages import Run


def describe(run: Run) -> None:
    """Say what each stage would do, one after the other; nothing is left behind."""
    with TemporaryDirectory() as folder:
        for name in run.stages:
            say(f"\n{name:20}{PLANS[name].what}")
            if run.config.resume and run.is_finished(name):
                say("finished: kept")
            else:
                _describe(run, name, Path(folder))


def _describe(run: Run, name: str, folder: Path) -> None:
    plan, settings = PLANS[name], replace(run.settings(name), dry_run=True)
    if plan.start and not run.is_finished(plan.start):
        root = plan.start
        while not run.is_finished(root) and PLANS[root].start:
            root = PLANS[root].start
        stand_in = run.model(root) if run.is_finished(root) else str(folder / root)
        say(f"model   {root} stands for that of {plan.start}, which has not run")
        settings = replace(settings, model_name_or_path=stand_in)
    if name == "scenario_rl":
        _describe_scenarios(run, settings, folder)
    elif plan.needs and not run.is_finished(plan.needs):
        say(f"steps   {settings.max_steps:,} of {settings.per_device_train_batch_size:,} examples")
        say(f"data    its records, and so tokens and memory, are known once {plan.needs} has run")
    elif name == "reasoning_rl":
        grpo.main(settings, r1_rewards.reasoning_rewards(run.config))
    else:
        trainer = plan.recipe.main(settings)
        if plan.recipe is base:
            trainer.model.save_pretrained(folder / name)
            trainer.processing_class.save_pretrained(folder / name)


def _describe_scenarios(run: Run, settings: Any, folder: Path) -> None:
    """The last RL stage, whose data is mixed first and whose reward model need not be there."""
    config, path = run.config, str(folder / "scenarios.jsonl")
    r1_data.write_scenarios(config.problems, config.general_prompts, config.general_share, path)
    grpo.main(replace(settings, dataset=path), r1_rewards.scenario_rewards(config, _unscored))


def _unscored(completions: list[str], **_: Any) -> list[None]:
    """Stand for the reward model; a dry run scores nothing."""
    return [None] * len(completions)
