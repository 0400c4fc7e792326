"""The stages of recipes/r1.py: which recipe each calls, with what settings, data and start.

run = Run(config)
run.check()              # ConfigError for a wrong setting or a missing start, before any training
run.do("reasoning_rl")   # trains, evaluates the saved model, writes result.json

The settings suit the tiny world; `settings:` of the configuration replaces any of them.
"""

from __future__ import annotations

import json
import os
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import base
import grpo
import r1_data
import r1_rewards
import r1_zero
import rejection_sampling
import reward_model
import sft

from posttrain.errors import ConfigError
from posttrain.run.folder import check_run, write_whole
from posttrain.run.options import say, validate
from posttrain.run.settings import ModelConfig
from posttrain.run.sources import convert, did_you_mean
from posttrain.selection.select import ANSWERS

if TYPE_CHECKING:
    from types import ModuleType

    from r1 import Config

RESULT = "result.json"
SFT = {"per_device_train_batch_size": 32, "learning_rate": 1e-3, "logging_steps": 25}
RL = {
    "per_device_train_batch_size": 128,
    "learning_rate": 2e-4,
    "logging_steps": 10,
    "reward_workers": 0,  # rules of milliseconds
    "rollout": "hf",  # vLLM starts longer than this trains
}
TINY = {"learning_rate": 3e-3}


SAMPLING = {"keep": "all_correct", "reward_workers": 0}


class Plan(NamedTuple):
    """A stage: its recipe, its start (a stage, or nothing), and settings for the recipe."""

    recipe: ModuleType
    start: str | None
    settings: dict[str, Any]
    what: str
    needs: str | None = None  # another stage whose result it takes


PLANS = {
    "base": Plan(base, None, TINY | {"max_steps": 800}, "writes as the corpus does"),
    "r1_zero": Plan(r1_zero, "base", RL | {"max_steps": 60}, "base -> RL from rules alone"),
    "cold_start_samples": Plan(
        rejection_sampling,
        "r1_zero",
        SAMPLING | {"max_prompts": 150, "num_generations": 8},
        "r1_zero -> answers, rewritten and kept where readable",
    ),
    "cold_start": Plan(
        sft, "base", SFT | {"max_steps": 40}, "base -> SFT on them", "cold_start_samples"
    ),
    "reasoning_rl": Plan(
        grpo, "cold_start", RL | {"max_steps": 24}, "RL: accuracy + language consistency"
    ),
    "curated_samples": Plan(
        rejection_sampling,
        "reasoning_rl",
        SAMPLING | {"max_prompts": 2000, "num_generations": 2},
        "reasoning_rl -> answers, kept where readable, and general data",
    ),
    "curated_sft": Plan(
        sft, "base", SFT | {"max_steps": 120}, "base again -> SFT on them", "curated_samples"
    ),
    "reward_model": Plan(
        reward_model, "curated_sft", {"max_steps": 60, "logging_steps": 20}, "pairs -> one number"
    ),
    "scenario_rl": Plan(
        grpo,
        "curated_sft",
        RL | {"max_steps": 80, "learning_rate": 1e-4},
        "RL over all scenarios: rules and preferences",
        "reward_model",
    ),
    "student": Plan(
        base, None, TINY | {"max_steps": 400, "hidden_size": 64}, "a smaller base model"
    ),
    "distill": Plan(
        sft,
        "student",
        SFT | {"max_steps": 120},
        "student -> SFT on the curated data, no RL",
        "curated_samples",
    ),
    "student_rl": Plan(r1_zero, "student", RL | {"max_steps": 24}, "student -> RL alone"),
}
UNMEASURED = ("cold_start_samples", "curated_samples", "reward_model")


class Run:
    """One run of the pipeline in config.output_dir."""

    def __init__(self, config: Config) -> None:
        self.config, self.root = config, Path(config.output_dir)
        given = {"base": config.model_name_or_path, "student": config.student_name_or_path}
        self.given = {name: model for name, model in given.items() if model}
        self.stages = [name for name in PLANS if name in config.stages and name not in self.given]

    def folder(self, name: str) -> str:
        """Return a stage's run folder."""
        return str(self.root / name)

    def model(self, name: str) -> str:
        """Return where a stage's model is, or will be."""
        return self.given.get(name, f"{self.folder(name)}/model")

    def result_of(self, name: str) -> str:
        """Return what a stage makes: a model, or the records of its samples."""
        is_data = PLANS[name].recipe is rejection_sampling
        return f"{self.folder(name)}.jsonl" if is_data else self.model(name)

    def is_finished(self, name: str) -> bool:
        """Tell whether a stage has made its result, which appears whole."""
        return name in self.given or Path(self.result_of(name)).exists()

    def check(self) -> None:
        """Raise ConfigError for settings or starts that cannot work. Nothing is trained or written.

        A finished stage is checked against the settings that it ran with.
        """
        for name in self.config.settings:
            if name not in PLANS:
                near = did_you_mean(name, PLANS) or f" Stages: {', '.join(PLANS)}."
                raise ConfigError(f"settings: expected the name of a stage, found {name!r}.{near}")
        r1_rewards.reasoning_rewards(self.config)
        r1_rewards.harmless(self.config)
        for name in self.stages:
            check_run(self.settings(name))
            for needed in filter(None, (PLANS[name].start, PLANS[name].needs)):
                if needed not in self.stages and not self.is_finished(needed):
                    raise ConfigError(
                        f"stages: {name} expected the result of {needed}, "
                        f"{self.result_of(needed)}, found none. Run that stage first, or with it: "
                        f"--stages {needed} {name}"
                    )

    def settings(self, name: str) -> Any:
        """Return the configuration of a stage's recipe."""
        config, plan = self.config, PLANS[name]
        given: dict[str, Any] = {
            "output_dir": self.folder(name),
            "seed": config.seed,
            "resume": config.resume,
            "dataset": self.data(name),
            "model_name_or_path": self.model(plan.start) if plan.start else config.tokenizer,
        }
        if plan.recipe is not base:
            given["template"] = config.template
        if plan.recipe in (grpo, r1_zero, rejection_sampling):
            given |= {
                "max_completion_length": config.max_completion_length,
                "reward": config.reward,
            }
        return self._made(plan.recipe, name, {**given, **plan.settings})

    def _made(self, recipe: ModuleType, name: str, given: dict[str, Any]) -> Any:
        """The recipe's Config, with what the user set for the stage."""
        annotations = typing.get_type_hints(recipe.Config)
        written = self.config.settings.get(name) or {}
        if not isinstance(written, dict):
            raise ConfigError(f"settings.{name}: expected 'key: value' lines, found {written!r}.")
        for key, value in written.items():
            where = f"settings.{name}.{key}"
            if key not in annotations:
                near = did_you_mean(key, annotations)
                raise ConfigError(f"{where}: unknown setting of recipes/{recipe.__name__}.{near}")
            is_plain = value is None or isinstance(value, (dict, list))
            text = [str(one) for one in value] if isinstance(value, list) else value
            given[key] = convert(annotations[key], text if is_plain else str(value), where)
        config = recipe.Config(**given)
        validate(config, {key: f"settings.{name}.{key}" for key in written})
        return config

    def data(self, name: str) -> str:
        """Return the file that a stage trains on."""
        config = self.config
        own = {
            "base": config.corpus,
            "student": config.corpus,
            "reward_model": config.preferences,
            "cold_start": self.result_of("cold_start_samples"),
            "curated_sft": self.result_of("curated_samples"),
            "distill": self.result_of("curated_samples"),
            "scenario_rl": str(self.root / "scenarios.jsonl"),
        }
        return own.get(name, config.problems)

    def do(self, name: str) -> None:
        """Run a stage and evaluate its model, unless both are done.

        A launch of several processes trains only; the next run of one process evaluates.
        """
        say(f"\n{name:20}{PLANS[name].what}")
        keeps = self.config.resume and self.is_finished(name)
        if keeps and self.result(name):
            say(f"{self.folder(name)} is finished: kept.")
            return
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / f".{name}.spent.json"
        spent = {"seconds": 0.0, "cpu_seconds": 0.0}
        if self.config.resume and path.is_file():
            spent = json.loads(path.read_text(encoding="utf-8"))
        if not keeps:
            try:
                with _clock(spent):
                    self._run(name)
            finally:
                write_whole(path, json.dumps(spent))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            say(f"{name} is not evaluated by several processes: start it again with python.")
            return
        measured = {} if name in UNMEASURED else self._judge(name)
        found = {"name": name, **measured, **{k: round(v, 1) for k, v in spent.items()}}
        write_whole(Path(self.folder(name), RESULT), json.dumps(found, indent=2) + "\n")

    def result(self, name: str) -> dict[str, Any] | None:
        """Return the content of a finished stage's result.json, else None."""
        path = Path(self.folder(name), RESULT)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _run(self, name: str) -> None:
        """Call the stage's recipe, with the rewards or the data that are R1's own."""
        config, recipe, settings = self.config, PLANS[name].recipe, self.settings(name)
        if name == "reasoning_rl":
            grpo.main(settings, r1_rewards.reasoning_rewards(config))
        elif name == "scenario_rl":
            r1_data.write_scenarios(
                config.problems, config.general_prompts, config.general_share, self.data(name)
            )
            grpo.main(settings, r1_rewards.scenario_rewards(config, self._preference()))
        else:
            recipe.main(settings)
        if recipe is rejection_sampling:
            write = r1_data.write_curated if name == "curated_samples" else r1_data.write_cold_start
            write(config, Path(self.folder(name), ANSWERS), self.result_of(name))

    def _preference(self) -> r1_rewards.SummaryReward:
        """The reward model, on final answers; the chosen ones of its pairs score 0 on average."""
        from posttrain.data import load_pairs
        from posttrain.models.load import load_tokenizer
        from posttrain.models.reward_model import load_reward

        config, model = self.config, self.model("reward_model")
        tokenizer = load_tokenizer(model)
        pairs = load_pairs(config.preferences, tokenizer, template=config.template, say=_quiet)
        scorer = load_reward(ModelConfig(model_name_or_path=model), tokenizer, centred_on=pairs)
        return r1_rewards.SummaryReward(scorer, tokenizer)

    def _judge(self, name: str) -> dict[str, float]:
        """Evaluate a stage's saved model: means over `eval_samples` of each held-out prompt."""
        from posttrain.commands.evaluate import evaluate_model

        config = self.config
        judged = partial(
            evaluate_model,
            self.model(name),
            template=getattr(self.settings(name), "template", config.template),
            max_tokens=config.max_completion_length,
            temperature=config.eval_temperature,
            num_samples=config.eval_samples,
            split="test",
        )
        found = judged(config.heldout, rewards=r1_rewards.reasoning_rewards(config))
        found["tokens"] = found.pop("mean_completion_tokens")
        if config.general_heldout:
            matches, safe = r1_rewards.final_answer_matches, r1_rewards.harmless(config)
            rewards = {"preferred": (matches, 1.0), "harmless": (safe, 1.0)}
            general = judged(config.general_heldout, rewards=rewards)
            found |= {column: general[column] for column in rewards}
        return found


def _quiet(_: str) -> None:
    """Say nothing."""


@contextmanager
def _clock(spent: dict[str, float]) -> Iterator[None]:
    """Add the block's seconds, and its CPU seconds in this process, to `spent`."""
    seconds, cpu_seconds = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        spent["seconds"] += time.monotonic() - seconds
        spent["cpu_seconds"] += time.process_time() - cpu_seconds
