"""One writer per format: an example to the columns of a row. The inverse of the parsers.

`WRITERS` is the one table. A writer raises DroppedRow when the format has no place for something;
what a writer could lose unnoticed, converting.py finds by reading the row back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from posttrain.data.examples import DroppedRow, Example, Message, with_input
from posttrain.data.templates import plain_turn

Values = dict[str, Any]
SPEAKERS = {"user": "human", "assistant": "gpt"}  # as ShareGPT names them


class Writer(NamedTuple):
    """format_name: in FORMATS. write: from an example and its row's column `answer`, if any."""

    format_name: str
    write: Callable[[Example, Any], Values]


def alpaca(example: Example, _answer: Any) -> Values:
    (question,) = _one_question(example)
    return {
        "instruction": question["content"],
        "input": example.input,
        "output": _one_text(example),
    }


def self_instruct(example: Example, answer: Any) -> Values:
    values = alpaca(example, answer)
    instance = {"input": values["input"], "output": values["output"]}
    return {"instruction": values["instruction"], "instances": [instance]}


def messages(example: Example, _answer: Any) -> Values:
    return {"messages": _conversation(example)}


def sharegpt(example: Example, _answer: Any) -> Values:
    turns = []
    for turn in _conversation(example):
        others = {key: value for key, value in turn.items() if key not in ("role", "content")}
        speaker = SPEAKERS.get(turn["role"], turn["role"])
        turns.append({"from": speaker, "value": turn["content"], **others})
    return {"conversations": turns}


def preference(example: Example, _answer: Any) -> Values:
    chosen, rejected = _answers(example, 2)
    prompt = example.bare_prompt
    if isinstance(prompt, list):
        return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
    return {"prompt": prompt, "chosen": chosen["content"], "rejected": rejected["content"]}


def dialogue_pairs(example: Example, _answer: Any) -> Values:
    turns = example.joined_turns
    chosen, rejected = _answers(example, 2)
    for turn in (*turns, chosen, rejected):
        if turn["role"] not in ("user", "assistant"):
            raise DroppedRow(f"with a {turn['role']} turn, for which dialogues have no place")
    history = "".join(map(plain_turn, turns))
    return {"chosen": history + plain_turn(chosen), "rejected": history + plain_turn(rejected)}


def prompt_completion(example: Example, _answer: Any) -> Values:
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


def unpaired(example: Example, answer: Any) -> Values:
    if len(example.labels) != 1:
        raise DroppedRow("without a label, good or bad")
    return {**prompt_completion(example, answer), "label": example.labels[0]}


def question_answer(example: Example, answer: Any) -> Values:
    return {"question": _joined_question(example), "answer": _worked(example, answer)}


def problem_answer(example: Example, answer: Any) -> Values:
    return {"problem": _joined_question(example), "answer": _worked(example, answer)}


def prompt_answer(example: Example, answer: Any) -> Values:
    return {"prompt": example.bare_prompt, "answer": _worked(example, answer)}


def problem_solution(example: Example, _answer: Any) -> Values:
    return {"problem": _joined_question(example), "solution": _one_text(example)}


def prompt(example: Example, _answer: Any) -> Values:
    return {"prompt": example.bare_prompt}


def text(example: Example, _answer: Any) -> Values:
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


def _worked(example: Example, answer: Any) -> Any:
    """The column `answer` itself, with marks that the parsers remove, where it is what is read."""
    return _one_text(example) if answer is None or example.gold is None else answer
