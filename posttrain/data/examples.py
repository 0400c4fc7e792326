"""The one shape into which every format is read and from which every template renders."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from posttrain.errors import DataError

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A prompt and its answers.

    where: file and row, for error messages.
    turns: the prompt as chat messages; empty for a plain document.
    answers: assistant messages: none for a prompt, one for a document, chosen and rejected for a
        pair.
    input: the second half of an Alpaca prompt, else empty.
    texts: (prompt, *answers) exactly as they stand in the file; None when the file holds messages.
    first_trained: assistant messages in `turns` from this index on are targets too; None: only
        the answer is.
    gold: the reference answer for a rule reward, where the row has one.
    gold_rule: where the gold was found.
    tests: what `posttrain.rewards.code` judges a program by, where the row's own columns say it in
        another way.
    labels: whether each answer is good, where the row says so; of a solution in steps, each step.
    tools: JSON schemas of the tools that a conversation offers.
    template_options: further variables for the chat template.
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
    labels: tuple[bool, ...] = ()
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] | None = None

    @property
    def instruction(self) -> str:
        """The one request of a prompt without history; a system text comes before it."""
        roles = [turn["role"] for turn in self.turns]
        if roles not in (["user"], ["system", "user"]):
            raise DataError(
                f"{self.where}: the prompt is a conversation ({', '.join(roles) or 'no turns'}), "
                "but the chosen template takes one question. Use template 'plain', or a tokenizer "
                "with a chat template."
            )
        return "\n\n".join(turn["content"] for turn in self.turns)

    @property
    def joined_turns(self) -> tuple[Message, ...]:
        """The prompt's turns, an Alpaca input joined to the question."""
        if not self.input:
            return self.turns
        *before, last = self.turns
        return (*before, user(with_input(last["content"], self.input)))

    @property
    def bare_prompt(self) -> str | list[Message]:
        """The prompt without a template: text where the source had a text of one question, else
        messages. This hangs on the source's format, not on its row: a column of both kinds is of
        little use.
        """
        turns = list(self.joined_turns)
        is_question = self.texts is not None and [turn["role"] for turn in turns] == ["user"]
        if is_question and turns[0]["content"].strip() == self.texts[0].strip():
            return turns[0]["content"]
        return turns


class Segment(NamedTuple):
    """A run of text; `ends`: an end-of-sequence token follows, unless the text closes with one."""

    text: str
    trained: bool = False
    ends: bool = False


class DroppedRow(Exception):
    """A row that is left out, and counted under this reason in the summary line."""


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def with_input(instruction: str, paired_input: str) -> str:
    """Instruction and paired input as one text, for templates that have one slot."""
    return f"{instruction}\n\n{paired_input}" if paired_input else instruction
