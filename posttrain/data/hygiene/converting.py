"""Rows of one format as rows of another, where nothing of their meaning is lost.

    convert(RowStream(["alpaca.json"]), "chat.jsonl", to="messages")

A row is read by the parser of its format, written by the target's writer, read back, and compared:
prompt, answers, what of them is trained, labels, reference answer. A row that would come back as
something else is not written; it is counted, and put beside with the reason.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.data.examples import DroppedRow, Example
from posttrain.data.formats import FORMATS, Format, parse_row
from posttrain.data.hygiene.outputs import beside, new_files
from posttrain.data.hygiene.rows import RowStream, format_of
from posttrain.data.hygiene.writers import WRITERS
from posttrain.data.load_labelled import OF_A_PAIR
from posttrain.data.records import Row
from posttrain.errors import ConfigError, DataError

OPTIONAL_COLUMNS = {"Alpaca": ("input",)}
PROMPT_ALONE = "prompt"  # the target that is asked for the prompt and nothing else
ANSWER_ALONE = "unpaired"  # the target that takes a pair apart


@dataclass(frozen=True)
class ConvertResult:
    """Every row is converted or removed; one with several instances gives several rows, and a pair
    two labelled answers."""

    num_rows: int
    num_written: int
    removed: dict[str, int]  # reason -> rows


def convert(stream: RowStream, output: str, *, to: str) -> ConvertResult:
    """Write the rows in the format `to`, a key of writers.WRITERS, with their other columns.

    Raises DataError for a row that cannot be read, and when none can be converted.
    """
    if to not in WRITERS:
        raise ConfigError(f"to: unknown format '{to}'; known: {', '.join(WRITERS)}.")
    target = next(entry for entry in FORMATS if entry.name == WRITERS[to].format_name)
    removed: Counter[str] = Counter()
    num_rows = 0
    with new_files(output, beside(output, "removed")) as (file, removed_file):
        for row in stream:
            num_rows += 1
            try:
                for values in converted(row, target, to):
                    file.write(values, row.where)
            except DroppedRow as reason:
                removed[str(reason)] += 1
                about = {"reason": str(reason), "file": row.file, "row": row.number}
                removed_file.write({**about, "record": row.values}, row.where)
        if not file.count:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in removed.items())
            raise DataError(
                f"{stream.name}: none of {num_rows:,} rows can become '{target.name}': {reasons}."
            )
    return ConvertResult(num_rows, file.count, dict(removed))


def converted(row: Row, target: Format, to: str) -> list[dict[str, Any]]:
    """The row's examples as rows of the target; DroppedRow if one of them loses its meaning."""
    source = format_of(row)
    examples = parse_row(source, row)
    _refuse_late_turns(row, source, examples)
    used = {*source.columns, *OPTIONAL_COLUMNS.get(source.name, ())}
    others = {name: value for name, value in row.values.items() if name not in used}
    rows = []
    if to == ANSWER_ALONE:
        examples = [one for example in examples for one in _labelled(example)]
    for example in examples:
        written = WRITERS[to].write(example, row.values.get("answer"))
        if example.gold is not None and "answer" not in target.columns and to != PROMPT_ALONE:
            others["answer"] = row.values.get("answer", example.gold)
        taken = sorted(written.keys() & others.keys())
        if taken:
            raise DroppedRow(f"that have another column '{taken[0]}' already")
        values = {**written, **others}
        _refuse_other_meaning(example, Row(values, row.file, row.number), target, to)
        rows.append(values)
    return rows


def _labelled(example: Example) -> list[Example]:
    """Of a preference pair its two answers, each with its label."""
    if len(example.answers) != len(OF_A_PAIR):
        return [example]
    return [
        replace(
            example, answers=(answer,), texts=example.texts and example.texts[:1], labels=(label,)
        )
        for answer, label in zip(example.answers, OF_A_PAIR, strict=True)
    ]


def _refuse_late_turns(row: Row, source: Format, examples: Sequence[Example]) -> None:
    """What follows the last answer is no part of an Example, and would be lost."""
    turns = row.values.get(source.columns[0])
    if source.name not in ("messages", "ShareGPT"):
        return
    read = [turn for e in examples for turn in (*e.turns, *e.answers)]
    has_system_column = source.name == "ShareGPT" and len(read) == len(turns) + 1
    if len(read) != len(turns) and not has_system_column:
        raise DroppedRow("with turns after the last answer")


def _refuse_other_meaning(example: Example, row: Row, target: Format, to: str) -> None:
    found = format_of(row)
    if found is not target:
        raise DroppedRow(f"whose other columns make the format '{found.name}'")
    back = parse_row(found, row)
    if len(back) != 1:
        raise AssertionError(f"the writer of '{target.name}' wrote {len(back)} examples as one")
    before, after = _meaning(example), _meaning(back[0])
    if example.gold is None:
        before.pop("reference answer")
    for part in ["prompt"] if to == PROMPT_ALONE else before:
        if before[part] != after[part]:
            raise DroppedRow(f"whose {part} '{target.name}' cannot hold")


def _meaning(example: Example) -> dict[str, Any]:
    turns = [*example.joined_turns, *example.answers]
    last = len(turns) - len(example.answers)
    first = last if example.first_trained is None else example.first_trained
    trained = [i for i, t in enumerate(turns) if t["role"] == "assistant" and i >= first]
    stripped = [{**turn, "content": turn["content"].strip()} for turn in turns]
    return {
        "prompt": stripped[:last],
        "answers": stripped[last:],
        "trained turns": trained if example.turns else "all",
        "labels": example.labels,
        "reference answer": example.gold,
        "tools": (example.tools, example.template_options),
    }
