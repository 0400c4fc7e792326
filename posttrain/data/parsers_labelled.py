"""Rows whose answers, or whose steps, are each labelled good or bad."""

from dataclasses import replace
from typing import Any

from posttrain.data.examples import Example, assistant, user
from posttrain.data.parsers import prompt_completion
from posttrain.data.records import Row

TRUE, FALSE = (True, 1, "true", "1"), (False, 0, "false", "0")  # CSV holds text


def unpaired(row: Row) -> list[Example]:
    """KTO: a prompt, one completion, and whether it is a good one."""
    label = _label(row, "label", row.values["label"])
    return [replace(example, labels=(label,)) for example in prompt_completion(row)]


def stepwise(row: Row) -> list[Example]:
    """A solution in steps, each labelled right or wrong."""
    steps, labels = row.values["completions"], row.values["labels"]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps) or not steps:
        raise row.wrong_type("completions", steps, "a list of texts, one a step")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise row.wrong_type("labels", labels, f"a list of {len(steps)} labels, one a step")
    marks = tuple(_label(row, f"labels[{place}]", label) for place, label in enumerate(labels))
    prompt = row.text("prompt")
    answers = tuple(map(assistant, steps))
    return [Example(row.where, (user(prompt),), answers, texts=(prompt, *steps), labels=marks)]


def _label(row: Row, place: str, value: Any) -> bool:
    word = value.lower() if isinstance(value, str) else value
    if word in (*TRUE, *FALSE):
        return word in TRUE
    raise row.wrong_type(place, value, "true or false (or 1 or 0)")
