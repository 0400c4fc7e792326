"""Long2short: teach a model with long completions to answer in fewer tokens, by four methods.

    python recipes/long2short.py                             tiny model, all four methods, 2 cores
    python recipes/long2short.py --methods dpo rl --dataset my.jsonl --model_name_or_path …

Reads problems (question, and answer or tests), writes the run folder: a run folder for each method,
summary.json (accuracy and mean tokens of completions on held-out problems, before and after) and,
for shortest and dpo, answers.jsonl, records.jsonl, pairs.jsonl as rejection_sampling.py does, from
`--num_generations` completions of the long model. `--resume` continues what is not finished.
Kimi k1.5, arXiv 2501.12599 section 2.4. Left out: several processes.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from common import DPO_MODEL, LONG_MODEL, Rewards, begin, rule_rewards
from sampling_setup import SamplingConfig, describe_sampling, prompts_and_sampler

from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors, say
from posttrain.run.settings import RLConfig
from posttrain.selection.rules import shortest_against_longer, shortest_correct

TEMPERATURE = 0.6  # of held-out completions, as DeepSeek-R1 was evaluated

Method = Literal["merge", "shortest", "dpo", "rl"]  # functions of recipes/long2short_ways.py


@dataclass(kw_only=True)
class Config(RLConfig, SamplingConfig):
    """Settings of recipes/long2short.py."""

    methods: list[Method] = option([*get_args(Method)], "methods to run, each from the same model")
    model_name_or_path: str = LONG_MODEL
    eval_dataset: str = option(
        "data/heldout.jsonl", "held-out problems that all models are evaluated on"
    )
    short_model: str = option(
        DPO_MODEL, "folder of a model with short completions and the same shape, for merge"
    )
    template: str = "alpaca"
    num_generations: int = 8
    ratio: float = option(
        1.5,
        "right completions this many times as long as the shortest are rejected, for dpo",
        above=1,
    )
    sft_learning_rate: float = option(
        1e-3, "peak learning rate of shortest; learning_rate is that of rl", above=0
    )
    sft_steps: int = option(20, "optimizer steps of shortest; max_steps is that of rl", at_least=1)
    dpo_learning_rate: float = option(3e-5, "peak learning rate of dpo", above=0)
    dpo_steps: int = option(20, "optimizer steps of dpo", at_least=1)
    dpo_beta: float = option(0.1, "DPO's beta: large values stay near the long model", above=0)
    length_weight: float = option(0.5, "weight of the length reward in rl", above=0)
    short_completion_length: int = option(48, "longest completion of rl in tokens", at_least=1)
    per_device_train_batch_size: int = 64
    max_steps: int = 30
    output_dir: str = "runs/long2short"

    def check(self) -> None:
        """Raise ConfigError for what cannot go with several models."""
        if self.push_to_hub:
            raise ConfigError(
                "push_to_hub: expected a recipe of one model; this one makes one for each method. "
                "Send the one that you choose with: hf upload NAME FOLDER"
            )
        super().check()


def main(config: Config) -> list[dict]:
    """Run the methods, evaluate their models and return summary.json's content; [] by --dry_run."""
    rewards = rule_rewards(config)
    begin(config, config.short_model if "merge" in config.methods else None)

    from long2short_ways import check_data, methods

    from posttrain.commands.evaluate import evaluate_model
    from posttrain.run.folder import open_run
    from posttrain.selection.sample import sample_completions
    from posttrain.selection.select import ANSWERS, write_selection

    check_data(config, rewards)
    learns_from_samples = not {"shortest", "dpo"}.isdisjoint(config.methods)
    if learns_from_samples:
        prompts, roll_out = prompts_and_sampler(config, rewards)
    if config.dry_run:
        if learns_from_samples:
            describe_sampling(config, prompts)
        describe(config, rewards)
        return []
    run = open_run(config.output_dir, config, resume=config.resume)
    if learns_from_samples:
        sample_completions(
            run / ANSWERS,
            prompts,
            roll_out,
            prompts_per_batch=config.prompts_per_batch,
            seed=config.seed,
        )
        pair = partial(shortest_against_longer, ratio=config.ratio)
        write_selection(run, keep=shortest_correct, pair=pair, right_by="accuracy")
    models = {"before": config.model_name_or_path}
    for name in config.methods:
        say(f"\n{name}")
        step = replace(config, methods=[name], output_dir=str(run / name))
        models[name] = f"{step.output_dir}/model"
        if not Path(models[name]).exists():
            methods()[name](step, run, rewards)
    settings = {"template": config.template, "max_tokens": config.max_completion_length}
    rows = []
    say(f"\n{'':10}{'accuracy':>10}{'tokens':>9}  model")
    for name, model in models.items():
        found = evaluate_model(
            model, config.eval_dataset, rewards=rewards, temperature=TEMPERATURE, **settings
        )
        rows.append({"name": name, "model": model, **found})
        say(f"{name:10}{found['accuracy']:>10.1%}{found['mean_completion_tokens']:>9.1f}  {model}")
    (run / "summary.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def describe(config: Config, rewards: Rewards) -> None:
    """Say for `--dry_run` what each method would do, as far as it can be known before sampling."""
    from long2short_ways import methods

    steps = {"shortest": config.sft_steps, "dpo": config.dpo_steps}
    for name in config.methods:
        say(f"\n{name}")
        if name == "merge":
            say(f"merges  {config.model_name_or_path} and {config.short_model}; trains nothing")
        elif name == "rl":
            methods()[name](config, Path(config.output_dir), rewards)
        else:
            say(f"steps   {steps[name]:,} of {config.per_device_train_batch_size:,} examples")
            say("data    its records, and so tokens and memory, are known after sampling")


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
