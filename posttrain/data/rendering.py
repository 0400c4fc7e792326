"""Examples to text, in segments that are trained or not, by the template that was chosen."""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from posttrain.data.chat import LOST_REASONING, ChatTemplate
from posttrain.data.chat_checks import lost_reasoning
from posttrain.data.examples import Example, Message, Segment
from posttrain.data.formats import Format
from posttrain.data.templates import TEMPLATES, PromptTemplate, plain_prompt, plain_turn
from posttrain.errors import ConfigError, DataError


class TextTemplate:
    """A prompt function, with the answer's text directly after it."""

    adds_bos = True

    def __init__(self, name: str, prompt: PromptTemplate) -> None:
        self.name, self.template = name, prompt
        self.rules: dict[str, int] = {}  # as ChatTemplate has; here nothing has to be found
        self.noted: dict[str, list[str]] = {}

    def prompt(self, example: Example) -> str:
        if self.template in TEMPLATES.values():  # a function of the user's may write them
            self._refuse_tools(example, example.turns)
        return self.template(example)

    def answers(self, example: Example) -> list[str]:
        self._refuse_tools(replace(example, tools=None), example.answers)
        texts = self._answers(example)
        if any(map(lost_reasoning, example.answers, texts)):
            self.noted.setdefault(LOST_REASONING, []).append(example.where)
        return texts

    def documents(self, example: Example) -> list[list[Segment]]:
        (answer,) = self.answers(example)
        before = [Segment(self.prompt(example))]
        if self.template is plain_prompt and example.first_trained is not None:
            before = _history(example)
        return [[*before, Segment(answer, trained=True, ends=True)]]

    def _answers(self, example: Example) -> list[str]:
        if self.template is not plain_prompt:
            return [answer["content"] for answer in example.answers]
        if example.texts is None:
            return [" " + answer["content"] for answer in example.answers]
        return list(example.texts[1:])

    def _refuse_tools(self, example: Example, turns: Sequence[Message]) -> None:
        calls = any(turn.get("tool_calls") for turn in turns)
        if example.tools or calls:
            raise DataError(
                f"{example.where}: the row has {'tool calls' if calls else 'tools'}, for which the "
                f"template '{self.name}' has no place. Use template 'chat' with the tokenizer of a "
                "model that calls tools."
            )


def choose_template(
    template: str | PromptTemplate, tokenizer: Any, entry: Format, *, default: str
) -> Any:
    """The renderer for `template`: a name of TEMPLATES, "chat", "auto" or a prompt function.

    "auto" is the tokenizer's chat template where it has one, else "plain" for text and
    conversations, else `default`. Plain documents (format text) take no template at all.
    """
    if callable(template):
        return TextTemplate(getattr(template, "__name__", "custom"), template)
    names = ["auto", "chat", *TEMPLATES]
    if template not in names:
        near = difflib.get_close_matches(template, names, n=1)
        raise ConfigError(
            f"template: unknown name '{template}'; known: {', '.join(names)}."
            + (f" Did you mean '{near[0]}'?" if near else "")
        )
    if entry.name == "text":
        if template not in ("auto", "plain"):
            raise ConfigError(
                f"template '{template}': rows of plain text have no prompt to put into a template. "
                "Use template 'auto' or 'plain'."
            )
        return TextTemplate("plain", plain_prompt)
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "auto":
        template = "chat" if has_chat else "plain" if entry.plain else default
    if template == "chat" and not has_chat:
        raise ConfigError(
            "template 'chat': this tokenizer has no chat template. Use 'alpaca' or 'plain', or "
            "the tokenizer of a chat model."
        )
    return (
        ChatTemplate(tokenizer)
        if template == "chat"
        else TextTemplate(template, TEMPLATES[template])
    )


def _history(example: Example) -> list[Segment]:
    """The turns before the answer, each assistant turn among them trained from first_trained on."""
    segments, untrained = [], ""
    for place, turn in enumerate(example.turns):
        text = plain_turn(turn)
        if turn["role"] == "assistant" and place >= example.first_trained:
            mark, content = text[: -len(turn["content"]) - 1], " " + turn["content"]
            segments += [Segment(untrained + mark), Segment(content, trained=True, ends=True)]
            untrained = ""
        else:
            untrained += text
    return [*segments, Segment(untrained + "\n\nAssistant:")]
