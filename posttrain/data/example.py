r"""Example: the one shape into which every format is read and from which every template renders.

    example = Example("pairs.jsonl, row 1", (user("Why?"),), (assistant("So."), assistant("No.")))

Beside it stands what can be found inside a message: the reference answer of a worked solution
(GSM8K's `#### 18`, LaTeX's `\boxed{18}`), and reasoning that a template may leave out.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from posttrain.errors import DataError

Message = dict[str, Any]  # role, content, and whatever else a chat template reads

HASHES = re.compile(r"####[ \t]*(?P<gold>\S[^\n]*?)\s*\Z")
THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
BOXED = "\\boxed{"
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # as transformers reads them
THINK_BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
# Stands in a turn's text where an image does; like encode.SPELLED, Unicode keeps it out of texts.
IMAGE = "\ufdd1"


@dataclass(frozen=True)
class Example:
    """A prompt and its completions.

    where: file and row, for error messages.
    turns: the prompt as chat messages; empty for a plain document.
    answers: assistant messages: none for a prompt, one for a document, chosen and rejected for a
        pair.
    input: the second half of an Alpaca prompt, else empty.
    texts: (prompt, *answers) exactly as they stand in the file; None when the file holds messages.
    first_trained: assistant messages in `turns` from this index on are targets too; None: only
        the answer is.
    gold: the reference answer for a rule reward, where the row has one.
    gold_rule: the rule of `reference_answer` that found the gold.
    tests: what `posttrain.rewards.code` judges a program by, where the row's own columns say it in
        another way.
    labels: True for a good answer and False for a bad one, where the row says so; for a solution
        in steps, one label per step, None where nobody judged it.
    tools: JSON schemas of the tools that a conversation offers.
    template_options: further variables for the chat template.
    images: where the images are (posttrain.data.images), one for each IMAGE in the turns.
    """

    where: str
    turns: tuple[Message, ...]
    answers: tuple[Message, ...] = ()
    input: str = ""
    texts: tuple[str, ...] | None = None
    first_trained: int | None = None
    gold: str | None = None
    gold_rule: str = ""
    tests: list[dict[str, str]] | None = None
    labels: tuple[bool | None, ...] = ()
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] | None = None
    images: tuple[dict[str, Any], ...] = ()

    @property
    def instruction(self) -> str:
        """The one request of a prompt without history; a system text comes before it."""
        roles = [turn["role"] for turn in self.turns]
        if roles not in (["user"], ["system", "user"]):
            raise DataError(
                f"{self.where}: the prompt is a conversation ({', '.join(roles) or 'no turns'}), "
                "but the chosen template takes one question. Take template 'chat', the "
                "tokenizer's own, or 'plain'."
            )
        return "\n\n".join(turn["content"] for turn in self.turns)

    @functools.cached_property
    def all_texts(self) -> list[str]:
        """All text of turns, answers and tools, reasoning and calls included, and of the input."""
        turns = [v for t in (*self.turns, *self.answers) for k, v in t.items() if k != "role"]
        return [*_texts_in([turns, self.tools]), self.input]

    @property
    def joined_turns(self) -> tuple[Message, ...]:
        """The prompt's turns, with an Alpaca input joined to the question."""
        if not self.input:
            return self.turns
        *before, last = self.turns
        return (*before, {**last, "content": with_input(last["content"], self.input)})

    @property
    def bare_prompt(self) -> str | list[Message]:
        """The prompt without a template: text if the source had a text of one question, else turns.

        The choice depends on the source's format and not on the row, because a column that mixes
        texts and messages is of little use.
        """
        turns = list(self.joined_turns)
        is_question = self.texts is not None and [turn["role"] for turn in turns] == ["user"]
        if is_question and turns[0]["content"].strip() == self.texts[0].strip():
            return turns[0]["content"]
        return turns

    def as_recorded(self) -> Example:
        """The example as it would be read back from a record of its bare prompt."""
        prompt = self.bare_prompt
        texts = (prompt,) if isinstance(prompt, str) else None
        return replace(self, turns=self.joined_turns, input="", texts=texts)


def with_texts(example: Example, change: Callable[[str, str], str]) -> Example:
    """The example with its texts changed: change(text, role of its turn, or "user")."""
    return replace(
        example,
        turns=tuple(_turn_changed(turn, change) for turn in example.turns),
        answers=tuple(_turn_changed(turn, change) for turn in example.answers),
        input=change(example.input, "user"),
        texts=example.texts and tuple(change(text, "user") for text in example.texts),
        tools=_changed(example.tools, "user", change),
    )


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts_in(list(pair))
    elif isinstance(value, list):
        for part in value:
            yield from _texts_in(part)


def _turn_changed(turn: Message, change: Callable[[str, str], str]) -> Message:
    role = turn["role"]
    return {k: v if k == "role" else _changed(v, role, change) for k, v in turn.items()}


def _changed(value: Any, role: str, change: Callable[[str, str], str]) -> Any:
    if isinstance(value, str):
        return change(value, role)
    if isinstance(value, dict):
        return {change(k, role): _changed(v, role, change) for k, v in value.items()}
    return [_changed(part, role, change) for part in value] if isinstance(value, list) else value


class Segment(NamedTuple):
    """A run of text; `ends`: an end-of-sequence token follows, unless the text closes with one."""

    text: str
    trained: bool = False
    ends: bool = False


class DroppedRow(Exception):
    """Raised for a row that is left out; the message is the reason it is counted under."""


@dataclass
class Places:
    """The number of rows in which something occurred, the first and the last of them."""

    count: int = 0
    first: str = ""
    last: str = ""

    def add(self, where: str) -> None:
        """Count one row."""
        self.count += 1
        self.first = self.first or where
        self.last = where


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": text}


def with_input(instruction: str, paired_input: str) -> str:
    """Instruction and paired input as one text, for templates that have one slot."""
    return f"{instruction}\n\n{paired_input}" if paired_input else instruction


def reference_answer(text: str) -> tuple[str, str]:
    """The answer that a rule reward compares with, and the rule that found it.

    The rules, in order: what follows `####` on the last line, without the commas of thousands;
    the content of the last `\\boxed{...}`; else the whole text.

    By hand: `reference_answer("2 * 500 = <<2*500=1000>>1000\\n#### 1,000") == ("1000", "####")`.
    """
    if match := HASHES.search(text):
        return THOUSANDS_COMMA.sub("", match["gold"]), "####"
    boxed = last_boxed(text)
    return (boxed, "\\boxed") if boxed is not None else (text.strip(), "whole text")


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}`, braces balanced; None if there is none."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth = 1
    for end in range(start + len(BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len(BOXED) : end].strip()
    return None


def without_calculator_marks(text: str) -> str:
    """GSM8K's worked text as a person would write it: `<<16-3=13>>` goes, `#### 13` stays.

    Only texts whose last line is `#### ...` are touched: elsewhere `<<...>>` may be code.
    """
    return CALCULATOR_MARK.sub("", text) if HASHES.search(text) else text


def lost_reasoning(turn: Message, rendered: str) -> bool:
    """True if reasoning of the message, in its own field or a <think> block, is not rendered."""
    thoughts = [turn[field] for field in REASONING_FIELDS if isinstance(turn.get(field), str)]
    if "<think>" in turn["content"]:
        thoughts += THINK_BLOCK.findall(turn["content"])
    return not all(is_rendered(thought, rendered) for thought in thoughts)


def in_parts(turn: Message) -> Message:
    """The turn as chat templates take one with images: its content is a list of parts."""
    parts: list[dict[str, str]] = []
    for place, text in enumerate(turn["content"].split(IMAGE)):
        parts += [{"type": "image"}] * (place > 0) + [{"type": "text", "text": text}] * bool(text)
    return {**turn, "content": parts}


def is_rendered(part: str, text: str) -> bool:
    """True if `part` stands in `text`, up to white space, as it is or as JSON writes it.

    Of a part with images that is each piece between them.
    """
    if IMAGE in part:
        return all(is_rendered(piece, text) for piece in part.split(IMAGE))
    if part.strip() in text:  # nearly always, and quick
        return True
    text = "".join(text.split())
    forms = (part, json.dumps(part, ensure_ascii=False)[1:-1])
    return any("".join(form.split()) in text for form in forms)
