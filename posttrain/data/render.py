"""Prompt templates, and examples to text: segments that are trained or not.

    renderer = choose_template("auto", tokenizer, entry, default="alpaca")
    renderer.prompt(example), renderer.answers(example)

`TEMPLATES` is the one table: functions from an example to the text that the completion follows. A
template without a name is passed as a function. None ends in a newline or space: the completion's
first token follows directly. Chat templates belong to the tokenizer and are rendered in chat.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from posttrain.data.chat import LOST_REASONING, ChatTemplate
from posttrain.data.example import Example, Message, Places, Segment, lost_reasoning, with_input
from posttrain.data.formats import Format
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptTemplate = Callable[[Example], str]

# Stanford Alpaca's two training prompts, to the letter: models trained on others' copies of this
# data expect them.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)

# DeepSeek-R1-Zero's four statements (arXiv 2501.12948, Table 1) in words of our own.
R1_ZERO = (
    "This is a conversation between a User and an Assistant. The User asks a question and the "
    "Assistant solves it. The Assistant first reasons in its mind, step by step, and only then "
    "tells the User the answer. It writes the reasoning within <think> </think> and the answer "
    "within <answer> </answer>, like this: <think> reasoning here </think> "
    "<answer> answer here </answer>.\nUser: {question}\nAssistant:"
)


def alpaca_prompt(example: Example) -> str:
    """Stanford Alpaca's prompt, with or without an input."""
    if example.input:
        # With an input, `turns` holds the instruction alone.
        return ALPACA_WITH_INPUT.format(instruction=example.instruction, input=example.input)
    return ALPACA_WITHOUT_INPUT.format(instruction=example.instruction)


def r1_zero_prompt(example: Example) -> str:
    """R1-Zero's prompt, which asks for <think> and <answer> tags."""
    return R1_ZERO.format(question=with_input(example.instruction, example.input))


def r1_zero_think_prompt(example: Example) -> str:
    """R1-Zero with the opening tag given: a format reward has to put `<think>` back first."""
    return r1_zero_prompt(example) + " <think>"


def plain_prompt(example: Example) -> str:
    """The prompt as it stands in the file; messages as "\\n\\nHuman: ...\\n\\nAssistant:"."""
    if example.texts is not None:
        return example.texts[0]
    return "".join(map(plain_turn, example.turns)) + "\n\nAssistant:"


def plain_turn(turn: Message) -> str:
    """One turn of a dialogue as HH-RLHF writes it: "\\n\\nHuman: ..."."""
    speaker = {"user": "Human", "assistant": "Assistant"}.get(turn["role"], turn["role"].title())
    return f"\n\n{speaker}: {turn['content']}"


TEMPLATES: dict[str, PromptTemplate] = {
    "alpaca": alpaca_prompt,
    "r1_zero": r1_zero_prompt,
    "r1_zero_think": r1_zero_think_prompt,
    "plain": plain_prompt,
}


class Renderer(Protocol):
    """An example to text, by a prompt template or the tokenizer's chat template.

    adds_bos: False if the text brings its beginning-of-sequence token itself.
    rules: rule -> number of trained turns that it found. noted: reason -> rows, for the summary.
    """

    name: str
    adds_bos: bool
    rules: dict[str, int]
    noted: dict[str, Places]

    def prompt(self, example: Example) -> str:
        """The text that the completion follows."""
        ...

    def answers(self, example: Example) -> list[str]:
        """The text of each completion, as it follows the prompt."""
        ...

    def documents(self, example: Example) -> list[list[Segment]]:
        """Prompt and completion as documents, each in segments; mostly one document."""
        ...


class TextTemplate:
    """Renders examples with a prompt function; the completion's text follows directly after it."""

    adds_bos = True

    def __init__(self, name: str, template: PromptTemplate) -> None:
        self.name, self.template = name, template
        self.rules: dict[str, int] = {}  # empty: no trained turn has to be searched for
        self.noted: dict[str, Places] = {}

    def prompt(self, example: Example) -> str:
        """The prompt function's text; DataError for tools that a named template would lose."""
        if self.template in TEMPLATES.values():  # a user's own function may write them
            self._refuse_tools(example, example.turns)
        return self.template(example)

    def answers(self, example: Example) -> list[str]:
        """The completions as they stand in the file, or the content of their messages."""
        self._refuse_tools(replace(example, tools=None), example.answers)
        texts = self._answers(example)
        if any(map(lost_reasoning, example.answers, texts)):
            self.noted.setdefault(LOST_REASONING, Places()).add(example.where)
        return texts

    def documents(self, example: Example) -> list[list[Segment]]:
        """One document; in plain conversations each earlier assistant turn may be trained too."""
        (answer,) = self.answers(example)
        before = [Segment(self.prompt(example))]
        if self.template is plain_prompt and example.first_trained is not None:
            before = _history(example)
        is_target = example.answers[0].get("trained", True)
        return [[*before, Segment(answer, trained=is_target, ends=True)]]

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
    template: str | PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    entry: Format,
    *,
    default: str,
) -> Renderer:
    """The renderer for `template`: a name of TEMPLATES, "chat", "auto" or a prompt function.

    "auto" is the tokenizer's chat template where it has one, else "plain" for text and
    conversations, else `default`. Plain documents (format text) take no template at all.

    Raises ConfigError for an unknown name, and for a template that does not fit the data or the
    tokenizer.
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
    if template != "chat":
        return TextTemplate(template, TEMPLATES[template])
    if not has_chat:
        raise ConfigError(
            "template 'chat': this tokenizer has no chat template. Use 'alpaca' or 'plain', or "
            "the tokenizer of a chat model."
        )
    return ChatTemplate(tokenizer)


def is_ready(renderer: Renderer, example: Example) -> bool:
    """True if the model gets the text just as a file holds it, control tokens included."""
    return renderer.name == "plain" and example.texts is not None


def _history(example: Example) -> list[Segment]:
    """The turns before the answer, each assistant turn among them trained from first_trained on."""
    segments, untrained = [], ""
    for place, turn in enumerate(example.turns):
        text = plain_turn(turn)
        if turn["role"] == "assistant" and place >= example.first_trained:
            mark, content = text[: -len(turn["content"]) - 1], " " + turn["content"]
            is_target = turn.get("trained", True)
            segments += [Segment(untrained + mark), Segment(content, trained=is_target, ends=True)]
            untrained = ""
        else:
            untrained += text
    return [*segments, Segment(untrained + "\n\nAssistant:")]
