"""Parsers of pairs whose prompt is no column `prompt`: a question, a conversation, whole dialogues.

    (example,) = dialogue_pair(Row({"chosen": "…", "rejected": "…"}, "pairs.jsonl", 1))

As those of parsers.py: a row in and its examples out; DroppedRow for a row that is left out.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

from posttrain.data.example import DroppedRow, Example, Message, assistant, user
from posttrain.data.parsers import (
    ROLES,
    exchange_of,
    instruction_of,
    message_of,
    message_pair,
    messages_of,
)
from posttrain.data.read import Row
from posttrain.errors import DataError

HUMAN_MARK, ASSISTANT_MARK = "\n\nHuman:", "\n\nAssistant:"
TURN_MARK = re.compile("\n\n(Human|Assistant):")
WHOLE_WORDS = re.compile(r".*\S(?=\s)", re.DOTALL)
# How the names of columns begin that tell of a row and are no prompt.
ABOUT = re.compile(
    "source|data|model|id|lang|licen|url|type|split|subset|categ|topic|score|note", re.IGNORECASE
)


def question_pair(row: Row) -> list[Example]:
    """Orca's pairs: a question and two answers; a column `system` is the system turn."""
    if _holds_dialogues(row):
        return dialogue_pair(row)
    return [exchange_of(row, row.text("question"), (row.text("chosen"), row.text("rejected")))]


def instruction_pair(row: Row) -> list[Example]:
    """Alpaca with two outputs: instruction, input (may be empty), chosen and rejected."""
    if _holds_dialogues(row):
        return dialogue_pair(row)
    chosen = instruction_of(row, row.text("input"), row.text("chosen"))
    rejected = row.text("rejected")
    answers = (*chosen.answers, assistant(rejected))
    return [replace(chosen, answers=answers, texts=(*chosen.texts, rejected))]


def conversation_pair(row: Row) -> list[Example]:
    """ShareGPT with two last turns: a conversation, and chosen and rejected as one turn each."""
    if _holds_dialogues(row):
        return dialogue_pair(row)
    turns, endings = messages_of(row, "conversations"), []
    for column in ("chosen", "rejected"):
        turn = row.values[column]
        turn = turn[0] if isinstance(turn, list) and len(turn) == 1 else turn
        turn = assistant(turn) if isinstance(turn, str) else message_of(row, column, turn)
        if turn["role"] != "assistant":
            raise row.wrong_type(column, row.values[column], "a turn of the assistant")
        endings.append(turn)
    return [Example(row.where, tuple(turns), tuple(endings))]


def _holds_dialogues(row: Row) -> bool:
    """True where chosen is a whole dialogue, which needs no prompt beside it."""
    chosen = row.values["chosen"]
    is_dialogue = isinstance(chosen, list) and len(chosen) > 1
    return is_dialogue or (isinstance(chosen, str) and bool(TURN_MARK.search(chosen)))


def dialogue_pair(row: Row) -> list[Example]:
    """HH-RLHF: two whole dialogues that differ in the last answer, as text or as messages.

    Texts are split after the last "\\n\\nAssistant:" that both share. Rows whose dialogues part
    earlier, so that what follows holds more than one turn, are dropped: they share no prompt.
    Texts without "\\n\\nHuman:" and "\\n\\nAssistant:" part at the first word that differs.
    """
    if isinstance(row.values["chosen"], list):
        return [message_pair(row, [], messages_of(row, "chosen"), messages_of(row, "rejected"))]
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if not TURN_MARK.search(chosen) and not TURN_MARK.search(rejected):
        return [_parted_texts(row, chosen, rejected)]
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  (of characters)
    cut = shared.rfind(ASSISTANT_MARK) + len(ASSISTANT_MARK)
    if cut < len(ASSISTANT_MARK):
        raise DroppedRow("whose chosen and rejected share no prompt")
    texts = (chosen[:cut], chosen[cut:], rejected[cut:])
    if any(TURN_MARK.search(answer) for answer in texts[1:]):
        raise DroppedRow("whose chosen and rejected part before the last answer")
    answers = tuple(assistant(answer.strip()) for answer in texts[1:])
    return [Example(row.where, tuple(_turns_of_dialogue(texts[0])), answers, texts=texts)]


def _parted_texts(row: Row, chosen: str, rejected: str) -> Example:
    """The prompt is the whole words that both texts begin with."""
    questions = [
        name
        for name, value in row.values.items()
        if name not in ("chosen", "rejected")
        and isinstance(value, str)
        and " " in value.strip()
        and not ABOUT.search(name)
    ]
    if questions:
        raise DataError(
            f"{row.where}: chosen and rejected are texts without a prompt, and the column "
            f"'{questions[0]}' may hold it. Name it 'prompt', or remove it."
        )
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  (of characters)
    words = WHOLE_WORDS.match(shared)
    if not words:
        raise DroppedRow("whose chosen and rejected share no prompt")
    prompt = words.group()
    answers = [text.removeprefix(prompt) for text in (chosen, rejected)]
    turns = tuple(assistant(answer.strip()) for answer in answers)
    return Example(row.where, (user(prompt.strip()),), turns, texts=(prompt, *answers))


def _turns_of_dialogue(dialogue: str) -> list[Message]:
    """ "\\n\\nHuman: a\\n\\nAssistant: b ..." as messages; neighbours of one speaker are joined."""
    opening, *marked = TURN_MARK.split(dialogue)
    turns = [user(opening.strip())] if opening.strip() else []
    for speaker, content in zip(marked[::2], marked[1::2], strict=True):
        role, content = ROLES[speaker.lower()], content.strip()
        if not content:  # the mark that the answer follows
            continue
        if turns and turns[-1]["role"] == role:
            content = turns.pop()["content"] + "\n\n" + content
        turns.append({"role": role, "content": content})
    return turns
