"""Formats: found from a file's columns, and what each can be loaded as.

    entry = detect_format(records, PAIRS)
    examples = parse_row(entry, row)

`FORMATS` is the one table: to add a format, add an entry (and its parser to parsers.py). The first
entry whose columns are all present, and which can give what is needed, is taken.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from posttrain.data import pairs, parsers, prm800k
from posttrain.data.example import (
    DroppedRow,
    Example,
    Message,
    assistant,
    reference_answer,
    user,
)
from posttrain.data.read import Records, Row
from posttrain.data.tools import TOOL_COLUMNS, with_tools
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.data.images import ImageReader

DOCUMENTS, PAIRS, PROMPTS = "documents", "pairs", "prompts"
UNPAIRED, STEPS = "labelled answers", "labelled steps"
EMPTY_ANSWER, EMPTY_PROMPT = "with an empty answer", "with an empty prompt"


@dataclass(frozen=True)
class Need:
    """One use of data, and what its loader (a function of posttrain.data) asks of an example.

    num_answers: completions that an example must have at least.
    template: the one that "auto" means where the tokenizer has no chat template.
    limit: name of the loader's argument that limits the tokens.
    """

    loader: str
    num_answers: int
    template: str = "alpaca"
    limit: str = "max_length"


NEEDS = {
    DOCUMENTS: Need("load_documents", num_answers=1),
    PAIRS: Need("load_pairs", num_answers=2),
    PROMPTS: Need("load_prompts", num_answers=0, template="r1_zero", limit="max_prompt_length"),
    UNPAIRED: Need("load_unpaired", num_answers=1),
    STEPS: Need("load_steps", num_answers=1),
}


@dataclass(frozen=True)
class Format:
    """One shape of row.

    columns: those that every row must fill.
    gives: what its rows can be loaded as: keys of NEEDS.
    parse: a row to its examples; raises DroppedRow for a row that is left out.
    plain: template "auto" keeps the text as it is where the tokenizer has no chat template,
        since an instruction template has no place for several turns.
    """

    name: str
    columns: tuple[str, ...]
    gives: tuple[str, ...]
    parse: Callable[[Row], list[Example]]
    plain: bool = False


BOTH = (DOCUMENTS, PROMPTS)
PAIRED = (PAIRS, PROMPTS, UNPAIRED)
LABELLED = (UNPAIRED, *BOTH)
KTO_COLUMNS, STEP_COLUMNS = ("prompt", "completion", "label"), ("prompt", "completions", "labels")

FORMATS = (
    Format("Alpaca", ("instruction", "output"), BOTH, parsers.alpaca),
    Format("self-instruct tasks", ("instruction", "instances"), BOTH, parsers.self_instruct),
    Format("messages", ("messages",), BOTH, parsers.messages, plain=True),
    Format("ShareGPT", ("conversations",), BOTH, parsers.sharegpt, plain=True),
    Format("preference", ("prompt", "chosen", "rejected"), PAIRED, parsers.preference),
    Format("question pairs", ("question", "chosen", "rejected"), PAIRED, pairs.question_pair),
    Format(
        "instruction pairs", ("instruction", "chosen", "rejected"), PAIRED, pairs.instruction_pair
    ),
    Format(
        "conversation pairs",
        ("conversations", "chosen", "rejected"),
        PAIRED,
        pairs.conversation_pair,
        plain=True,
    ),
    Format("dialogue pairs", ("chosen", "rejected"), PAIRED, pairs.dialogue_pair, plain=True),
    Format("HumanEval", ("prompt", "test", "entry_point"), (PROMPTS,), parsers.human_eval),
    Format("MBPP", ("text", "code", "test_list"), (PROMPTS,), parsers.mbpp),
    Format("MBPP, sanitized", ("prompt", "code", "test_list"), (PROMPTS,), parsers.mbpp_sanitized),
    Format("code problem", ("question", "tests"), (PROMPTS,), parsers.code_problem),
    Format("question/answer", ("question", "answer"), BOTH, parsers.question_answer),
    Format("problem/solution", ("problem", "solution"), BOTH, parsers.problem_solution),
    Format("problem/answer", ("problem", "answer"), BOTH, parsers.problem_answer),
    Format("unpaired preference", KTO_COLUMNS, LABELLED, parsers.unpaired),
    Format("stepwise supervision", STEP_COLUMNS, (STEPS, PROMPTS), parsers.stepwise),
    Format("PRM800K", ("question", "label"), (STEPS,), prm800k.prm800k),
    Format("prompt/completion", ("prompt", "completion"), BOTH, parsers.prompt_completion),
    Format("prompt/answer", ("prompt", "answer"), BOTH, parsers.prompt_answer),
    Format("text", ("text",), (DOCUMENTS,), parsers.text, plain=True),
    Format("prompt", ("prompt",), (PROMPTS,), parsers.prompt),
)


# What a column means that may stand beside any format's own. Every other column is named as unused.
BESIDE = {
    *("input", "system", "history", "answer", "margin", "chat_template_kwargs", *TOOL_COLUMNS),
    *("tests", "test_setup_code", "test_imports", "challenge_test_list"),
}
# What a text model cannot learn from; one of vision reads `images`.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def unused_columns(entry: Format, columns: Sequence[str]) -> list[str]:
    """The columns of which nothing is read."""
    known = {*BESIDE, *MEDIA, *entry.columns}
    return [name for name in columns if name not in known]


def detect_format(records: Records, need: str) -> Format:
    """The first format in FORMATS that fits the columns and gives `need`; DataError when none."""
    columns = records.columns
    fitting = [entry for entry in FORMATS if set(entry.columns) <= set(columns)]
    for entry in fitting:
        if need in entry.gives:
            return entry
    found = f"{records.source}: columns {', '.join(columns)}"
    if fitting:
        problem = (
            f"{found} make the format '{fitting[0].name}', which gives "
            f"{' or '.join(fitting[0].gives)}, not {need}."
            f"{_misspelling(columns, need)} Use {_loaders(fitting[0])}."
        )
    else:
        problem = f"{found} make no known format.{_misspelling(columns, need)}"
    known = [f"{' + '.join(e.columns)} ({e.name})" for e in FORMATS if need in e.gives]
    raise DataError(f"{problem} Columns for {need}: {'; '.join(known)}.")


def parse_row(entry: Format, row: Row, images: ImageReader | None = None) -> list[Example]:
    """The row's examples; DataError naming file, row and field when a field is missing.

    images: reads the column `images`; without it a row that fills that column is left out.
    """
    filled = [name for name, value in row.values.items() if value is not None]
    missing = [name for name in entry.columns if name not in filled]
    if missing:
        names = " and no ".join(f"'{name}'" for name in missing)
        raise DataError(
            f"{row.where}: no {names}. A record of the format '{entry.name}' needs "
            f"{', '.join(entry.columns)}; found: {', '.join(filled) or 'nothing'}."
        )
    for name in MEDIA:
        if row.values.get(name) and not (images and name == "images"):
            raise DroppedRow(f"with {name}, which a text model cannot see")
    examples = [_with_context(row, example) for example in entry.parse(row)]
    for example in examples:
        _refuse_half_characters(example)
    if any(row.values.get(column) is not None for column in TOOL_COLUMNS):
        examples = [with_tools(row, example) for example in examples]
    if images and (row.values.get("images") or any(map(images.are_named, examples))):
        examples = [images.placed(row, example) for example in examples]
    answer = row.values.get("answer")
    is_answer = isinstance(answer, (str, int, float)) and not isinstance(answer, bool)
    if "answer" in entry.columns or not is_answer:
        return examples
    # A column of reference answers beside any other format serves the rewards just the same.
    gold, rule = reference_answer(row.text_or_number("answer"))
    return [replace(example, gold=gold, gold_rule=rule) for example in examples]


def _refuse_half_characters(example: Example) -> None:
    for text in example.all_texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{example.where}: its text holds {text[error.start : error.end]!r}, half of a "
                "character (a lone surrogate). Remove it, or write the file again as UTF-8."
            ) from None


def _with_context(row: Row, example: Example) -> Example:
    """The example behind what the columns `system` and `history` say, if the row has them."""
    system, history = row.text("system"), _history(row)
    has_system = bool(example.turns) and example.turns[0]["role"] == "system"
    opening = [] if has_system or not system.strip() else [{"role": "system", "content": system}]
    if not example.turns or not (opening or history):
        return example
    own = example.turns[:1] if has_system else ()
    before = (*own, *opening, *history)
    first = example.first_trained
    return replace(
        example,
        turns=(*before, *example.turns[len(own) :]),
        texts=None,
        first_trained=None if first is None else first + len(before) - len(own),
    )


def _history(row: Row) -> list[Message]:
    """The column `history`: pairs of a question and its answer, or messages; empty without it."""
    history = row.values.get("history") or []
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return parsers.messages_of(row, "history") if history else []
    is_pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        for pair in history
    )
    if not is_pairs:
        raise row.wrong_type("history", history, "a list of [question, answer] or of messages")
    return [turn for question, answer in history for turn in (user(question), assistant(answer))]


def reason_to_drop(example: Example, need: str) -> str:
    """The reason for which the example cannot be used as `need`; empty if it can."""
    num_answers = NEEDS[need].num_answers
    contents = [a["content"].strip() or a.get("tool_calls", "") for a in example.answers]
    if len(contents) < num_answers:
        return "without an assistant turn"
    if example.gold == "":
        return EMPTY_ANSWER
    last = example.turns[-1] if example.turns else None
    if last and last["role"] in ("system", "user") and not last["content"].strip():
        return EMPTY_PROMPT
    if num_answers and not all(contents):
        return EMPTY_ANSWER
    if num_answers and need != STEPS and len(set(map(str, example.answers))) < len(contents):
        return "whose chosen equals rejected"
    if need == DOCUMENTS and False in example.labels:
        return "labelled as a bad answer"
    return _reason_of_turns(example) if need == DOCUMENTS else ""


def _reason_of_turns(example: Example) -> str:
    """The reason for which a conversation of several targets cannot be used."""
    if example.first_trained is None:
        return ""
    turns = example.turns[example.first_trained :]
    targets = [turn for turn in turns if turn["role"] == "assistant"]
    targets = [turn for turn in targets if turn.get("trained", True)]
    if any(not turn["content"].strip() and not turn.get("tool_calls") for turn in targets):
        return EMPTY_ANSWER
    if (*example.turns, *example.answers)[0]["role"] == "assistant":
        return "that begins with the assistant"
    if not targets and not example.answers[0].get("trained", True):
        return "whose turns are all marked as untrained"
    return ""


def _loaders(entry: Format) -> str:
    return " or ".join(NEEDS[given].loader for given in entry.gives)


def _misspelling(columns: list[str], need: str) -> str:
    known = {name for entry in FORMATS if need in entry.gives for name in entry.columns}
    for column in columns:
        near = difflib.get_close_matches(column.lower(), known - set(columns), n=1, cutoff=0.75)
        if near:
            return f" Did you mean '{near[0]}' for '{column}'?"
    return ""
