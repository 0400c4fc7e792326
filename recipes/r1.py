"""DeepSeek-R1's four stages and the distillation, from a base model to a table.

    make r1 [SEED=1]        or: python recipes/r1.py --seed 1 --output_dir runs/r1/seed_1
    python recipes/r1.py --stages scenario_rl distill         # those alone, from the models there
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/r1.py \\
        --config recipes/configs/r1_qwen2.5_7b.yaml --stages reasoning_rl

Each stage calls a recipe with settings of its own (r1_stages.py) and writes a run folder below
output_dir, with result.json: the saved model on held-out problems and general instructions. A stage
that is finished is kept, and one that was stopped goes on. arXiv 2501.12948, sections 2.3 and 2.4;
docs/r1.md. Left out: people who edit the cold start's answers, and a model that judges answers
without a rule.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors, say

Stage = Literal[
    "base",
    "r1_zero",
    "cold_start_samples",
    "cold_start",
    "reasoning_rl",
    "curated_samples",
    "curated_sft",
    "reward_model",
    "scenario_rl",
    "student",
    "distill",
    "student_rl",
]


@dataclass(kw_only=True)
class Config:
    """Settings of recipes/r1.py; those of a stage's recipe stand under `settings:` in YAML."""

    stages: list[Stage] = option([*get_args(Stage)], "stages to run, in this order")
    model_name_or_path: str | None = option(
        None, "folder or Hub name of the base model; none: stage base trains a tiny one"
    )
    student_name_or_path: str | None = option(
        None, "base model that is distilled into; none: stage student trains a tiny one"
    )
    corpus: str = option("data/r1/corpus.jsonl", "texts of the tiny base models")
    tokenizer: str = option("data/r1/tokenizer", "folder of the tiny base models' tokenizer")
    problems: str = option("data/r1/problems.jsonl", "problems of RL and of sampling")
    heldout: str = option("data/r1/heldout.jsonl", "held-out problems")
    general: str = option(
        "data/r1/general.jsonl", "general instructions with answers, with and without a thought"
    )
    general_prompts: str = option(
        "data/r1/general_prompts.jsonl", "general instructions of the last RL stage: question"
    )
    general_share: float = option(
        0.25, "share of general prompts in the last RL stage", above=0, at_most=1
    )
    general_heldout: str | None = option(
        "data/r1/general_heldout.jsonl",
        "held-out general instructions with the answer that people prefer; none: not measured",
    )
    preferences: str = option(
        "data/r1/preferences.jsonl", "pairs of final answers, for the reward model"
    )
    template: str = option("r1_zero", "prompt format of all stages: r1_zero, chat, …")
    max_completion_length: int = option(56, "longest completion in tokens", at_least=1)
    reward: str = option("math", "accuracy reward: math, code, exact, choice, FILE.py:FUNCTION")
    language: str = option("en", "language of the reasoning, an ISO 639-1 code")
    among: list[str] | None = option(["en", "zh"], "languages that occur; none: any")
    glossary: dict[str, Any] = option(
        {"个": "ones", "十": "tens"},
        "word -> translation, in the cold start's answers",
    )
    cold_start_limit: int = option(1, "most records of a prompt in the cold start", at_least=1)
    curated_limit: int = option(2, "most records of a prompt in the curated data", at_least=1)
    max_paragraph_chars: int = option(
        72, "characters of the longest paragraph that is fine-tuned on", at_least=1
    )
    language_weight: float = option(1.0, "weight of the language reward", at_least=0)
    preference_weight: float = option(1.0, "weight of the reward model's", at_least=0)
    harmless_weight: float = option(1.0, "weight of the harmlessness reward", at_least=0)
    harmless: str = option("words", "harmlessness reward: words, or FILE.py:FUNCTION")
    harmful_words: list[str] = option(["fool"], "what the reward words looks for")
    preference_from_step: int = option(
        40, "optimizer step of the last stage from which preferences count", at_least=0
    )
    eval_temperature: float = option(0.6, "sampling temperature of evaluation", at_least=0)
    eval_samples: int = option(4, "completions of each held-out prompt in evaluation", at_least=1)
    settings: dict[str, Any] = option({}, "stage -> settings of its recipe")
    seed: int = option(0, "seed of all stages", at_least=0)
    output_dir: str = option("runs/r1", "folder of the stages' run folders and the summary")
    resume: bool = option(
        True, "keep finished stages, continue stopped ones; otherwise they are moved aside"
    )
    dry_run: bool = option(False, "say what each stage would do, and run none")

    def check(self) -> None:
        """Raise ConfigError for languages, words or stages that cannot work."""
        from posttrain.rewards.language import check_language

        for code in (self.language, *(self.among or ())):
            check_language(code)
        if self.harmless == "words" and not all(self.harmful_words):
            raise ConfigError("harmful_words: expected words, found an empty one.")
        for name, model in (
            ("base", self.model_name_or_path),
            ("student", self.student_name_or_path),
        ):
            if model and self.settings.get(name):
                raise ConfigError(
                    f"settings: expected none for {name}, which is {model} and not trained; found "
                    f"{', '.join(self.settings[name])}."
                )


def main(config: Config) -> dict:
    """Run the stages, and return the content of summary.json; nothing by --dry_run."""
    from r1_stages import Run

    run = Run(config)
    run.check()
    say(f"R1, seed {config.seed}: {', '.join(run.stages)}")
    if config.dry_run:
        from r1_dry_run import describe

        describe(run)
        return {}
    for name in run.stages:
        run.do(name)
    results = [found for name in get_args(Stage) if (found := run.result(name))]
    summary = {"seed": config.seed, "stages": results}
    from posttrain.run.folder import write_whole

    write_whole(Path(config.output_dir) / "summary.json", json.dumps(summary, indent=2) + "\n")
    say(table(results, config.eval_samples))
    return summary


def table(results: list[dict[str, Any]], eval_samples: int) -> str:
    """Format the results, one line for each stage; – stands where nothing is measured."""
    columns = ("accuracy", "format", "language", "tokens", "preferred", "harmless", "cpu_seconds")
    heads = [*columns[:-1], "CPU s"]
    lines = ["", f"{'stage':20}" + "".join(f"{head:>11}" for head in heads)]
    for result in results:
        cells = [_cell(name, result.get(name)) for name in columns]
        lines.append(f"{result['name']:20}" + "".join(f"{cell:>11}" for cell in cells))
    total = sum(result["seconds"] for result in results)
    lines.append(f"\n{eval_samples} samples of each held-out prompt; {total:.0f} seconds in all.")
    return "\n".join(lines)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "cpu_seconds":
        return f"{value:.0f}"
    return f"{value:.1f}" if name == "tokens" else f"{value:.1%}"


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
