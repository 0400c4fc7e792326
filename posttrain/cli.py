"""`posttrain COMMAND …`: recipes, and the tools around them.

    posttrain run dpo --loss ipo
    posttrain verify --gold 1/2 --answer '\\boxed{0.5}'
    posttrain evaluate runs/sft/model --dataset data/heldout.jsonl
    posttrain report runs/r1_zero

Commands import what they need when they are called, so that `posttrain --help` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from posttrain.errors import ConfigError
from posttrain.run.options import plain_errors
from posttrain.run.sources import did_you_mean


def recipes(argv: Sequence[str]) -> None:
    """List the recipes and their configs."""
    from posttrain.commands.recipes import list_recipes

    list_recipes(argv)


def run(argv: Sequence[str]) -> None:
    """Run a recipe: posttrain run dpo --loss ipo …"""
    from posttrain.commands.recipes import run_recipe

    run_recipe(argv)


def chat(argv: Sequence[str]) -> None:
    """Talk to a saved model, or to two side by side."""
    from posttrain.commands.chat import main

    main(argv)


def generate(argv: Sequence[str]) -> None:
    """Complete a prompt, or a file of prompts, as JSON lines."""
    from posttrain.commands.generate import main

    main(argv)


def verify(argv: Sequence[str]) -> None:
    """Judge answers against golds, and show which rule decided."""
    from posttrain.commands.verify import main

    main(argv)


def data(argv: Sequence[str]) -> None:
    """Inspect, clean, mix, split and convert data files."""
    from posttrain.commands.data import main

    main(argv)


def merge(argv: Sequence[str]) -> None:
    """Merge models with the same shapes into one."""
    from posttrain.commands.merge import main

    main(argv)


def evaluate(argv: Sequence[str]) -> None:
    """Measure a saved model on held-out problems."""
    from posttrain.commands.evaluate import main

    main(argv)


def report(argv: Sequence[str]) -> None:
    """Write the report of a run: one page with its result, curves and samples."""
    from posttrain.commands.report import report_main

    report_main(argv)


def compare(argv: Sequence[str]) -> None:
    """Write a page that compares runs."""
    from posttrain.commands.report import compare_main

    compare_main(argv)


def export(argv: Sequence[str]) -> None:
    """Write a model for vLLM, Ollama or llama.cpp, or merge its adapter."""
    from posttrain.commands.export import main

    main(argv)


def env(argv: Sequence[str]) -> None:
    """Show versions, processor and GPUs, to paste into an issue."""
    from posttrain.commands.env import main

    main(argv)


def plan(argv: Sequence[str]) -> None:
    """Plan the memory of a run on GPUs, engine by engine."""
    from posttrain.commands.plan import main

    main(argv)


def completion(argv: Sequence[str]) -> None:
    """Print what makes a shell complete commands: bash, zsh or fish."""
    from posttrain.commands.completion import main

    main(argv, list(COMMANDS))


# name: the function that runs it, whose docstring is its line in `posttrain --help`
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "recipes": recipes,
    "run": run,
    "chat": chat,
    "generate": generate,
    "verify": verify,
    "data": data,
    "merge": merge,
    "evaluate": evaluate,
    "eval": evaluate,
    "report": report,
    "compare": compare,
    "export": export,
    "env": env,
    "plan": plan,
    "completion": completion,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that `argv` (default `sys.argv[1:]`) names first, with the rest of it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("--help", "-h"):
        print("usage: posttrain COMMAND …   (posttrain COMMAND --help says more)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:12}{command.__doc__}")
        return
    with plain_errors():
        if argv[0] not in COMMANDS:
            near = did_you_mean(argv[0], COMMANDS)
            raise ConfigError(
                f"expected a command ({', '.join(COMMANDS)}), found '{argv[0]}'.{near}"
            )
        COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    main()
