"""Convert: rows of one format as rows of another, where nothing of their meaning is lost.

    convert(RowStream(["alpaca.json"]), "chat.jsonl", to="messages")

A row is read by the parser of its format, written by the target's writer, read back, and compared:
prompt, answers, what of them is trained, labels, reference answer. A row that would come back as
something else is not written; it is counted, and put beside with the reason.

`WRITERS` is the one table: one writer per format, from an example to the columns of a row, the
inverse of the parsers. A writer raises DroppedRow when the format has no place for something; what
it could lose unnoticed is found by reading the row back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from posttrain.data.example import DroppedRow, Example, Message, with_input
from posttrain.data.formats import FORMATS, Format, parse_row
from posttrain.data.load import OF_A_PAIR
from posttrain.data.read import Row
from posttrain.data.render import plain_turn
from posttrain.errors import ConfigError, DataError
from posttrain.hygiene.outputs import beside, new_files
from posttrain.hygiene.rows import RowStream, format_of

OPTIONAL_COLUMNS = {"Alpaca": ("input",)}
PROMPT_ALONE = "prompt"  # the target that is asked for the prompt and nothing else
ANSWER_ALONE = "unpaired"  # the target that takes a pair apart
SPEAKERS = {"user": "human", "assistant": "gpt"}  # as ShareGPT names them

Values = dict[str, Any]  # the columns of a row


@dataclass(frozen=True)
class ConvertResult:
    """Counts of rows; each row read is either converted or removed.

    num_written may be larger: a task with several instances gives several rows, and a pair two
    labelled answers.
    """

    num_rows: int
    num_written: int
    removed: dict[str, int]  # reason -> rows


def convert(stream: RowStream, output: str, *, to: str) -> ConvertResult:
    """Write the rows in the format `to`, a key of WRITERS, with their other columns.

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
            written, reason = _converted_or_reason(row, target, to)
            for values in written:
                file.write(values, row.where)
            if reason:
                removed[reason] += 1
                about = {"reason": reason, "file": row.file, "row": row.number}
                removed_file.write({**about, "record": row.values}, row.where)
        if not file.count:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in removed.items())
            raise DataError(
                f"{stream.name}: none of {num_rows:,} rows can become '{target.name}': {reasons}."
            )
    return ConvertResult(num_rows, file.count, dict(removed))


def _converted_or_reason(row: Row, target: Format, to: str) -> tuple[list[Values], str]:
    """The rows that the row becomes, or the reason why it becomes none."""
    try:
        return converted(row, target, to), ""
    except DroppedRow as reason:
        return [], str(reason)


def converted(row: Row, target: Format, to: str) -> list[Values]:
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
        written = WRITERS[to].write(example)
        if (
            "answer" in written
            and example.gold is not None
            and row.values.get("answer") is not None
        ):
            written["answer"] = row.values["answer"]  # with the marks that the parsers remove
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
    """The two answers of a preference pair, each with its label; other examples as they are."""
    if len(example.answers) != len(OF_A_PAIR):
        return [example]
    return [
        replace(
            example, answers=(answer,), texts=example.texts and example.texts[:1], labels=(label,)
        )
        for answer, label in zip(example.answers, OF_A_PAIR, strict=True)
    ]


def _refuse_late_turns(row: Row, source: Format, examples: Sequence[Example]) -> None:
    """Raise DroppedRow for turns after the last answer, which no Example holds."""
    turns = row.values.get(source.columns[0])
    if source.name not in ("messages", "ShareGPT"):
        return
    read = [turn for e in examples for turn in (*e.turns, *e.answers)]
    has_system_column = source.name == "ShareGPT" and len(read) == len(turns) + 1
    if len(read) != len(turns) and not has_system_column:
        raise DroppedRow("with turns after the last answer")


def _refuse_other_meaning(example: Example, row: Row, target: Format, to: str) -> None:
    """Raise DroppedRow, naming the part, if the written row reads as another example."""
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


def _meaning(example: Example) -> dict[str, object]:
    """The parts of an example that a conversion must keep, by name."""
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


class Writer(NamedTuple):
    """The name of a format in FORMATS, and the function that writes an example in it."""

    format_name: str
    write: Callable[[Example], Values]


def alpaca(example: Example) -> Values:
    """Instruction, input and output."""
    (question,) = _one_question(example)
    return {
        "instruction": question["content"],
        "input": example.input,
        "output": _one_text(example),
    }


def self_instruct(example: Example) -> Values:
    """A task with one instance."""
    values = alpaca(example)
    instance = {"input": values["input"], "output": values["output"]}
    return {"instruction": values["instruction"], "instances": [instance]}


def messages(example: Example) -> Values:
    """A conversation in OpenAI's layout."""
    return {"messages": _conversation(example)}


def sharegpt(example: Example) -> Values:
    """A conversation in ShareGPT's layout."""
    turns = []
    for turn in _conversation(example):
        others = {key: value for key, value in turn.items() if key not in ("role", "content")}
        speaker = SPEAKERS.get(turn["role"], turn["role"])
        turns.append({"from": speaker, "value": turn["content"], **others})
    return {"conversations": turns}


def preference(example: Example) -> Values:
    """A prompt with chosen and rejected: texts if the prompt is one, else messages."""
    chosen, rejected = _answers(example, 2)
    prompt = example.bare_prompt
    if isinstance(prompt, list):
        return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
    return {"prompt": prompt, "chosen": chosen["content"], "rejected": rejected["content"]}


def dialogue_pairs(example: Example) -> Values:
    """Two whole dialogues as text, which differ in the last answer (HH-RLHF)."""
    turns = example.joined_turns
    chosen, rejected = _answers(example, 2)
    for turn in (*turns, chosen, rejected):
        if turn["role"] not in ("user", "assistant"):
            raise DroppedRow(f"with a {turn['role']} turn, for which dialogues have no place")
    history = "".join(map(plain_turn, turns))
    return {"chosen": history + plain_turn(chosen), "rejected": history + plain_turn(rejected)}


def prompt_completion(example: Example) -> Values:
    """A prompt that is not trained and a completion that is."""
    prompt = example.bare_prompt
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": _one_text(example)}
    turns = [*example.joined_turns, *_answers(example, 1)]
    # What is trained goes into the completion, so what stands before the first trained turn is
    # the prompt.
    start = len(turns) - 1 if example.first_trained is None else example.first_trained
    roles = [turn["role"] for turn in turns[start:]]
    start += roles.index("assistant")
    return {"prompt": turns[:start], "completion": turns[start:]}


def unpaired(example: Example) -> Values:
    """A prompt and a completion with its label."""
    if len(example.labels) != 1:
        raise DroppedRow("without a label, good or bad")
    return {**prompt_completion(example), "label": example.labels[0]}


def question_answer(example: Example) -> Values:
    """A question and its worked answer."""
    return {"question": _joined_question(example), "answer": _one_text(example)}


def problem_answer(example: Example) -> Values:
    """A problem and its worked answer."""
    return {"problem": _joined_question(example), "answer": _one_text(example)}


def prompt_answer(example: Example) -> Values:
    """A prompt and its worked answer."""
    return {"prompt": example.bare_prompt, "answer": _one_text(example)}


def problem_solution(example: Example) -> Values:
    """A problem and its solution."""
    return {"problem": _joined_question(example), "solution": _one_text(example)}


def prompt(example: Example) -> Values:
    """The prompt alone."""
    return {"prompt": example.bare_prompt}


def text(example: Example) -> Values:
    """A plain text, all of which is trained."""
    if example.turns:
        raise DroppedRow("whose prompt would be trained as well, as all of a plain text is")
    return {"text": _one_text(example)}


WRITERS = {
    "alpaca": Writer("Alpaca", alpaca),
    "self_instruct": Writer("self-instruct tasks", self_instruct),
    "messages": Writer("messages", messages),
    "sharegpt": Writer("ShareGPT", sharegpt),
    "preference": Writer("preference", preference),
    "dialogue_pairs": Writer("dialogue pairs", dialogue_pairs),
    "unpaired": Writer("unpaired preference", unpaired),
    "question_answer": Writer("question/answer", question_answer),
    "problem_answer": Writer("problem/answer", problem_answer),
    "problem_solution": Writer("problem/solution", problem_solution),
    "prompt_completion": Writer("prompt/completion", prompt_completion),
    "prompt_answer": Writer("prompt/answer", prompt_answer),
    "prompt": Writer("prompt", prompt),
    "text": Writer("text", text),
}


def _answers(example: Example, count: int) -> tuple[Message, ...]:
    if not example.turns:
        raise DroppedRow("of plain text, in which nothing says where a prompt ends")
    if len(example.answers) != count:
        raise DroppedRow(f"with {len(example.answers)} answers, where the format has {count}")
    return example.answers


def _conversation(example: Example) -> list[Message]:
    if not example.answers:
        return list(example.joined_turns)
    return [*example.joined_turns, *_answers(example, 1)]


def _one_text(example: Example) -> str:
    if len(example.answers) != 1:
        raise DroppedRow(f"with {len(example.answers)} answers, where the format has 1")
    (answer,) = example.answers
    if set(answer) > {"role", "content"}:
        raise DroppedRow("whose answer holds more than text, such as tool calls")
    return answer["content"]


def _one_question(example: Example) -> tuple[Message, ...]:
    roles = [turn["role"] for turn in example.turns]
    if roles == ["user"]:
        return example.turns
    if not roles:
        raise DroppedRow("of plain text, in which nothing says where a prompt ends")
    if roles == ["system", "user"]:
        raise DroppedRow("with a system turn, for which the format has no place")
    raise DroppedRow("with several turns, where the format has one question")


def _joined_question(example: Example) -> str:
    (question,) = _one_question(example)
    return with_input(question["content"], example.input)
