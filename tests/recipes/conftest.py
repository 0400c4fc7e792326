"""A tiny base model, trained in seconds on one line of the shipped corpus, for all recipe tests."""

import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import ModelCard

from posttrain.report import card
from recipes import base

ROOT = Path(__file__).parents[2]
TOKENIZER = str(ROOT / "data" / "tiny_tokenizer")
MEMORISED = re.compile(r"User: (What is (\d+) \+ (\d+)\?)\nAssistant:(<think>.*<answer>(\d+)<.*)")


class Run(NamedTuple):
    """A recipe that ran to its end, and what it printed."""

    folder: Path
    config: Any
    trainer: Any
    said: str

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def environment(self) -> dict:
        return json.loads((self.folder / "env.json").read_text())

    @property
    def metrics(self) -> list[dict]:
        """One record for each step, without the summaries."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "loss" in record]


def run(recipe: Any, output_dir: Path, **settings: Any) -> Run:
    """`main` of a recipe in this process, logging each step."""
    config = recipe.Config(**{"output_dir": str(output_dir), "logging_steps": 1, **settings})
    with redirect_stdout(io.StringIO()) as said:
        trainer = recipe.main(config)
    return Run(output_dir, config, trainer, said.getvalue())


def card_of(done: Run) -> ModelCard:
    """The card of the saved model, as huggingface_hub reads it."""
    return ModelCard(card.card_of(done.folder, done.model, name=done.model))


def run_snippet(found: ModelCard) -> None:
    """Execute a card's Python, which loads the model and asks it something."""
    (code,) = re.findall(r"^```python\n(.*?)^```", found.text, re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})


class Problem(NamedTuple):
    question: str
    solution: str
    answer: str


@pytest.fixture(scope="session")
def memorised() -> tuple[str, Problem]:
    """A line of the shipped corpus in the think/answer shape whose sum is right, taken apart."""
    for line in (ROOT / "data" / "corpus.jsonl").read_text(encoding="utf-8").splitlines():
        match = MEMORISED.search(json.loads(line)["text"])
        if match and int(match[2]) + int(match[3]) == int(match[5]):
            return line, Problem(match[1], match[4], match[5])
    raise AssertionError("the corpus has no right answer in the think/answer shape")


@pytest.fixture(scope="session")
def first_rows(tmp_path_factory) -> Callable[[str, int], str]:
    """`first_rows("sft", 16)`: a file with the first rows of a shipped file."""

    def write(name: str, count: int) -> str:
        lines = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(True)
        path = tmp_path_factory.mktemp("rows") / f"{name}.jsonl"
        path.write_text("".join(lines[:count]), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def base_run(memorised, tmp_path_factory) -> Run:
    """A base model that often, not always, gives the memorised line: rewards then have a spread."""
    folder = tmp_path_factory.mktemp("chain")
    corpus = folder / "corpus.jsonl"
    corpus.write_text((memorised[0] + "\n") * 200, encoding="utf-8")
    return run(
        base, folder / "base", dataset=str(corpus), model_name_or_path=TOKENIZER, max_steps=14,
        per_device_train_batch_size=2, learning_rate=3e-3, lr_scheduler_type="constant",
    )  # fmt: skip
