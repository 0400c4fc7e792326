"""Parsers: one function per format, a row in and its examples out.

    (example,) = preference(Row({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs.jsonl", 1))

The table of formats is in formats.py. A parser raises DroppedRow, with the reason, for a row that
is left out, and DataError for a row that is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from posttrain.data.example import (
    IMAGE,
    DroppedRow,
    Example,
    Message,
    assistant,
    last_boxed,
    reference_answer,
    user,
    with_input,
    without_calculator_marks,
)
from posttrain.data.read import Row, kind_of
from posttrain.data.tools import read_calls
from posttrain.errors import DataError

NO_INPUT = "<noinput>"  # how self-instruct generations write an absent input
TRUE, FALSE = (True, 1, "true", "1"), (False, 0, "false", "0")  # CSV holds text
# Keys by which conversations say whether a turn of the assistant is a target, as true or false.
TRAINED_KEYS = frozenset({"weight", "train", "trained", "trainable", "loss", "loss_mask"})
Step = tuple[str, bool | None]  # its text, and whether it is right
ROLES = {  # as conversations name them -> as chat templates know them
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def alpaca(row: Row) -> list[Example]:
    """Stanford Alpaca: instruction, input (may be empty) and output."""
    return [instruction_of(row, row.text("input"), row.text("output"))]


def self_instruct(row: Row) -> list[Example]:
    """Self-Instruct: a task with its instances, one example for each instance."""
    instances = row.values["instances"]
    if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
        raise row.wrong_type("instances", instances, "a list of {input, output}")
    parts = [Row(instance, row.file, row.number) for instance in instances]
    for part in parts:
        if part.values.get("output") is None:
            raise DataError(
                f"{row.where}: an instance without 'output'. An instance needs input, output; "
                f"found: {', '.join(part.values) or 'nothing'}."
            )
    return [instruction_of(row, part.text("input"), part.text("output")) for part in parts]


def messages(row: Row) -> list[Example]:
    """A conversation; each of its assistant turns is a target."""
    return [_conversation(row, messages_of(row, "messages"))]


def sharegpt(row: Row) -> list[Example]:
    """ShareGPT: a conversation of {from, value}; a column `system` is its system turn."""
    return [_conversation(row, messages_of(row, "conversations"))]


def preference(row: Row) -> list[Example]:
    """A prompt and two completions: texts, or lists of messages (whole dialogues too)."""
    if isinstance(row.values["chosen"], str):
        prompt, texts = _prompt(row), (row.text("chosen"), row.text("rejected"))
        return [exchange_of(row, prompt, texts)]
    history = _prompt(row)
    chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
    shared = _shared_turns(chosen, rejected)
    turns = [user(history)] if isinstance(history, str) else history
    if chosen[: len(turns)] == turns and shared >= len(turns):
        turns = []  # the two dialogues repeat the prompt
    return [message_pair(row, turns, chosen, rejected)]


def question_answer(row: Row) -> list[Example]:
    """GSM8K: a question and its worked answer, which ends in the gold."""
    return [_worked(row, row.text("question"), row.text_or_number("answer"))]


def problem_answer(row: Row) -> list[Example]:
    """A problem and its worked answer, which holds the gold."""
    return [_worked(row, row.text("problem"), row.text_or_number("answer"))]


def prompt_answer(row: Row) -> list[Example]:
    """A prompt, text or messages, and its worked answer, which holds the gold."""
    return [_worked(row, _prompt(row), row.text_or_number("answer"))]


def problem_solution(row: Row) -> list[Example]:
    """MATH: a problem and its solution, in which the gold is boxed."""
    solution = row.text("solution")
    gold = last_boxed(solution)
    return [exchange_of(row, row.text("problem"), (solution,), gold=gold, gold_rule="\\boxed")]


def code_problem(row: Row) -> list[Example]:
    """A question with a column `tests`, which the code reward reads as it stands."""
    if not isinstance(row.values["tests"], list):
        raise row.wrong_type("tests", row.values["tests"], "a list of tests")
    return [exchange_of(row, row.text("question"), ())]


def human_eval(row: Row) -> list[Example]:
    """HumanEval: the head of a function to complete, and a test that defines `check(candidate)`."""
    head = row.text("prompt")
    test = {"check": row.text("test"), "entry_point": row.text("entry_point"), "prompt": head}
    return [replace(exchange_of(row, head, ()), tests=[test])]


def mbpp(row: Row) -> list[Example]:
    """MBPP: `test_setup_code` comes before each test; `challenge_test_list` counts as tests too."""
    return [_mbpp(row, row.text("text"), row.text("test_setup_code"))]


def mbpp_sanitized(row: Row) -> list[Example]:
    """MBPP's second edition, in which `test_imports` come before each test."""
    return [_mbpp(row, row.text("prompt"), "\n".join(_texts(row, "test_imports")))]


def prompt_completion(row: Row) -> list[Example]:
    """A prompt that is not trained and a completion that is: both texts, or lists of messages."""
    prompt = _prompt(row)
    if isinstance(row.values["completion"], str):
        return [exchange_of(row, prompt, (row.text("completion"),))]
    turns = [user(prompt)] if isinstance(prompt, str) else prompt
    completion = messages_of(row, "completion")
    if completion[-1]["role"] != "assistant":
        raise row.wrong_type("completion", row.values["completion"], "a last assistant message")
    before, answer = (*turns, *completion[:-1]), completion[-1]
    return [Example(row.where, before, (answer,), first_trained=len(turns))]


def text(row: Row) -> list[Example]:
    """Plain text, all of which is a target; it has no prompt."""
    document = row.text("text")
    return [Example(row.where, (), (assistant(document),), texts=("", document))]


def prompt(row: Row) -> list[Example]:
    """A prompt alone, text or messages."""
    return [exchange_of(row, _prompt(row), ())]


def unpaired(row: Row) -> list[Example]:
    """KTO: a prompt, one completion, and a label that says whether it is good."""
    label = _label(row, "label", row.values["label"])
    return [replace(example, labels=(label,)) for example in prompt_completion(row)]


def stepwise(row: Row) -> list[Example]:
    """A solution in steps, each labelled right or wrong."""
    steps, labels = row.values["completions"], row.values["labels"]
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        raise row.wrong_type("completions", steps, "a list of texts, one a step")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise row.wrong_type("labels", labels, f"a list of {len(steps)} labels, one a step")
    marks = tuple(_label(row, f"labels[{place}]", label) for place, label in enumerate(labels))
    return [solution_of(row, row.text("prompt"), tuple(zip(steps, marks, strict=True)))]


def solution_of(row: Row, prompt: str, steps: Sequence[Step]) -> Example:
    """Make the example of a solution in steps, (text, mark) each; None: a step without a label."""
    texts, marks = zip(*steps, strict=True)
    answers = tuple(map(assistant, texts))
    return Example(row.where, (user(prompt),), answers, texts=(prompt, *texts), labels=marks)


def _mbpp(row: Row, task: str, setup: str) -> Example:
    """The first test is shown, since the task does not name the function; the others are not."""
    asserts = [*_texts(row, "test_list"), *_texts(row, "challenge_test_list")]
    if not asserts:
        raise DroppedRow("without tests")
    question = f"{task}\n\nFor example:\n\n```python\n{asserts[0]}\n```"
    tests = [{"assert": each, "setup": setup} for each in asserts]
    return replace(exchange_of(row, question, ()), tests=tests)


def _texts(row: Row, column: str) -> list[str]:
    texts = row.values.get(column) or []
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise row.wrong_type(column, texts, "a list of texts")
    return texts


def instruction_of(row: Row, paired_input: str, output: str) -> Example:
    """Make the example of an instruction, its input and one output."""
    instruction = row.text("instruction")
    paired_input = "" if paired_input.strip() in ("", NO_INPUT) else paired_input
    texts = (with_input(instruction, paired_input), output)
    return Example(
        row.where, (user(instruction),), (assistant(output),), input=paired_input, texts=texts
    )


def _worked(row: Row, question: str | list[Message], answer: str) -> Example:
    gold, rule = reference_answer(answer)
    return exchange_of(
        row, question, (without_calculator_marks(answer),), gold=gold, gold_rule=rule
    )


def exchange_of(
    row: Row,
    question: str | list[Message],
    answers: tuple[str, ...],
    *,
    gold: str | None = None,
    gold_rule: str = "",
) -> Example:
    """Make the example of a question, text or messages, and its answers."""
    is_text = isinstance(question, str)
    return Example(
        row.where,
        (user(question),) if is_text else tuple(question),
        tuple(assistant(answer) for answer in answers),
        texts=(question, *answers) if is_text else None,
        gold=gold,
        gold_rule=gold_rule,
    )


def _conversation(row: Row, turns: list[Message]) -> Example:
    """Turns up to the last answer, every assistant turn a target; without one, a prompt only."""
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        return Example(row.where, tuple(turns))
    last = len(roles) - 1 - roles[::-1].index("assistant")
    return Example(row.where, tuple(turns[:last]), (turns[last],), first_trained=0)


def message_pair(
    row: Row, turns: list[Message], chosen: list[Message], rejected: list[Message]
) -> Example:
    """Make the pair of two dialogues that share all turns but the last."""
    shared = _shared_turns(chosen, rejected)
    endings = [dialogue[shared:] for dialogue in (chosen, rejected)]
    if not turns and not shared:
        raise DroppedRow("whose chosen and rejected share no prompt")
    if chosen == rejected:
        raise DroppedRow("whose chosen equals rejected")
    if any([turn["role"] for turn in ending] != ["assistant"] for ending in endings):
        raise DroppedRow("whose chosen and rejected part before the last answer")
    prompt_turns = (*turns, *chosen[:shared])
    return Example(row.where, prompt_turns, (endings[0][0], endings[1][0]))


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    pairs = list(zip(chosen, rejected, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _prompt(row: Row) -> str | list[Message]:
    if isinstance(row.values["prompt"], list):
        return messages_of(row, "prompt")
    return row.text("prompt")


def messages_of(row: Row, column: str) -> list[Message]:
    """A non-empty list of {role, content} or {from, value}, as {role, content} with known roles."""
    turns = row.values[column]
    if not isinstance(turns, list) or not turns:
        raise row.wrong_type(column, turns, "a list of messages")
    return [message_of(row, f"{column}[{place}]", turn) for place, turn in enumerate(turns)]


def message_of(row: Row, place: str, turn: object) -> Message:
    """Read one turn, as {role, content} with a known role and its other keys."""
    if not isinstance(turn, dict):
        raise row.wrong_type(place, turn, "a message with role and content")
    speaker = turn.get("role", turn.get("from"))
    if not isinstance(speaker, str) or speaker.lower() not in ROLES:
        raise DataError(
            f"{row.where}: '{place}' has the role {speaker!r}; known roles: {', '.join(ROLES)}."
        )
    content = turn.get("content", turn.get("value"))
    extra = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value")}
    extra = {k: v for k, v in extra.items() if v is not None}  # parquet fills absent keys
    for key in TRAINED_KEYS & extra.keys():
        extra["trained"] = _label(row, f"{place}.{key}", extra.pop(key))
    if speaker.lower() == "function_call":  # ShareGPT: the call's JSON text is the turn
        extra["tool_calls"], content = content, None
    if extra.get("tool_calls"):
        extra["tool_calls"] = read_calls(row, f"{place}.tool_calls", extra["tool_calls"])
    return {"role": ROLES[speaker.lower()], "content": _content(row, place, content, extra)} | extra


def _content(row: Row, place: str, content: object, extra: dict[str, Any]) -> str:
    if isinstance(content, list):
        texts = [_part(row, place, part) for part in content]
        if None not in texts:
            return "".join(texts)
    if content is None and extra.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise DataError(f"{row.where}: '{place}' has {kind_of(content)} as content; expected text.")
    return content


def _part(row: Row, place: str, part: object) -> str | None:
    """The text of one part of a content; None for a part that is neither text nor an image."""
    if not isinstance(part, dict):
        return None
    if isinstance(part.get("text"), str):
        return part["text"]
    if part.get("type") != "image":
        return None
    own = [key for key, value in part.items() if key != "type" and value is not None]
    if own or not row.values.get("images"):
        found = f"names it itself, in '{own[0]}'" if own else "the row has none"
        raise DataError(
            f"{row.where}: '{place}' has an image, and {found}. Expected it in the column "
            '\'images\': a list with one image for each part {"type": "image"}.'
        )
    return IMAGE


def _label(row: Row, place: str, value: object) -> bool:
    word = value.lower() if isinstance(value, str) else value
    if word in (*TRUE, *FALSE):
        return word in TRUE
    raise row.wrong_type(place, value, "true or false (or 1 or 0)")
