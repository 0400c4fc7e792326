"""What a chat template leaves out: turns, tools and calls that must not vanish, reasoning that may.

A template that knows no tools or no system turn often says nothing; it renders the rest.
"""

import json
import re
from collections.abc import Callable, Sequence

from posttrain.data.examples import Example, Message
from posttrain.data.tools import call_names, with_other_calls, with_other_tools
from posttrain.errors import DataError

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # as transformers reads them
THINK_BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def refuse_lost_turns(
    example: Example, turns: Sequence[Message], prompt: str, render: Callable[..., str]
) -> None:
    """DataError for a system, user or tool turn, tools or earlier calls missing in `prompt`.

    The text of earlier answers is not looked at: templates shorten it on purpose. Names of tools
    may stand in any text, so tools and calls count as rendered where others would render otherwise.
    """
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant" and not _holds(prompt, turn["content"]):
            raise _lost(example, f"turn {place + 1} ({turn['role']})")
    if example.tools and render(with_other_tools(example), turns) == prompt:
        raise _lost(example, "the column tools")
    if any(map(call_names, turns)) and render(example, with_other_calls(turns)) == prompt:
        raise _lost(example, "the calls of tools in earlier turns")


def refuse_lost_calls(example: Example, place: int, turn: Message, reply: str) -> None:
    """DataError for a tool call that the rendered turn does not hold."""
    called = reply.replace(turn["content"], "") if turn["content"] else reply
    for name in call_names(turn):
        if name not in called:
            raise _lost(example, f"the call of '{name}' in turn {place + 1}")


def lost_reasoning(turn: Message, reply: str) -> bool:
    """Whether reasoning in the message's own field, or in a <think> block, is not in `reply`."""
    thoughts = [turn[field] for field in REASONING_FIELDS if isinstance(turn.get(field), str)]
    thoughts += THINK_BLOCK.findall(turn["content"])
    return not all(_holds(reply, thought) for thought in thoughts)


def _holds(text: str, part: str) -> bool:
    """Whether `part` stands in `text`, whatever white space, as it is or as JSON writes it."""
    if part.strip() in text:  # nearly always, and quick
        return True
    text = "".join(text.split())
    forms = (part, json.dumps(part, ensure_ascii=False)[1:-1])
    return any("".join(form.split()) in text for form in forms)


def _lost(example: Example, what: str) -> DataError:
    return DataError(
        f"{example.where}: the chat template leaves out {what}. Take the tokenizer of a model "
        "whose template renders it, or remove it from the data."
    )
