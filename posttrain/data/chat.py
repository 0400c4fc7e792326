"""Chat templates: rendered conversations, and which characters of them the model has to learn.

    renderer = ChatTemplate(tokenizer)
    renderer.documents(example)    # one list of segments per document

Each trained turn stands behind the very prompt that the template would give the model at run time:
the turns before it, rendered with the generation prompt. What the turn adds is trained: as far as
generation marks say (marks.py), else all of it. Where the template renders a turn otherwise once
others follow, as reasoning templates drop earlier thinking, the conversation becomes several
documents; where a turn does not begin with its prompt, it is an error.

A template that knows no tools or no system turn often says nothing and renders the rest. So turns,
tools and calls that vanish are an error; reasoning may vanish, and is counted.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from posttrain.data.encode import control_tokens
from posttrain.data.example import (
    IMAGE,
    REASONING_FIELDS,
    Example,
    Message,
    Places,
    Segment,
    in_parts,
    is_rendered,
    lost_reasoning,
)
from posttrain.data.marks import (
    PROBE,
    TRL_MARKS,
    UNMARKED,
    Marking,
    Span,
    find_marking,
    turn_end_ids,
    without_marks,
)
from posttrain.data.tools import call_names, with_other_calls, with_other_tools
from posttrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOST_REASONING = "with reasoning that the template leaves out"
SPLIT = "made into several documents, since the chat template renders earlier turns otherwise"
SHOWN_CHARS = 40  # of two texts from where they differ, in an error


class Reply(NamedTuple):
    """The text that an assistant turn adds to its prompt.

    spans: the parts of `text` that are trained.
    closings: the ends of the special tokens that close the last span, from the first one on that
        ends a turn; empty without one.
    """

    prompt: str
    text: str
    spans: list[Span]
    closings: list[int]


class ChatTemplate:
    """Renders examples with the tokenizer's own chat template.

    rules: rule -> number of trained turns that it found. noted: reason -> rows, for the summary.
    """

    name = "chat"
    adds_bos = False  # the template writes it

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.rules: dict[str, int] = {}
        self.noted: dict[str, Places] = {}
        self._markings: dict[str, Marking] = {}
        self.special_token = control_tokens(tokenizer)
        ends = turn_end_ids(tokenizer)
        self.end_tokens = set(tokenizer.convert_ids_to_tokens(sorted(ends))) | {tokenizer.eos_token}

    def prompt(self, example: Example) -> str:
        """The turns before the answer, up to and with the generation prompt.

        Raises DataError if the template leaves out one of them, or refuses them.
        """
        turns = example.joined_turns
        text = self._prompt(example, turns)
        refuse_lost_turns(example, turns, text, self._prompt)
        return text

    def answers(self, example: Example) -> list[str]:
        """The text after the prompt for each answer, up to and with its end-of-turn token."""
        turns = example.joined_turns
        replies = [self._reply(example, [*turns, answer], len(turns)) for answer in example.answers]
        ends = [self._with_end_token(reply.text, 0, len(reply.text))[1] for reply in replies]
        return [reply.text[:end] for reply, end in zip(replies, ends, strict=True)]

    def documents(self, example: Example) -> list[list[Segment]]:
        """One document; more if the text before a turn depends on what follows the turn."""
        turns = [*example.joined_turns, *example.answers]
        first = len(turns) - 1 if example.first_trained is None else example.first_trained
        places = [
            place
            for place, turn in enumerate(turns)
            if turn["role"] == "assistant" and place >= first and turn.get("trained", True)
        ]
        documents: list[_Document] = []
        for place in places:
            reply = self._reply(example, turns, place)
            # The model sees the earlier turns as this prompt shows them. Where the last document
            # shows them otherwise (with their reasoning, say), a new one begins.
            if not (documents and documents[-1].is_continued_by(reply.prompt)):
                documents.append(_Document())
            documents[-1].add(reply)
        refuse_lost_turns(example, turns[: places[-1]], reply.prompt, self._prompt)
        if len(documents) > 1:
            self._note(SPLIT, example)
        return [_segments(document.text, document.spans) for document in documents]

    def _reply(self, example: Example, turns: list[Message], place: int) -> Reply:
        """The assistant turn `place`, rendered as if none followed."""
        prompt = self._prompt(example, turns[:place])
        for marking, before in self._attempts(example, turns[:place]):
            start, full, marks = self._marked(example, [*before, turns[place]], marking)
            # Marks count from the start of the text, and may begin within the prompt.
            spans = [(max(a - len(start), 0), b - len(start)) for a, b in marks if b > len(start)]
            if full.startswith(start) and spans:
                break
        else:
            raise _no_reply(example, place, start, full)
        text = full[len(start) :]
        spans = [self._with_end_token(text, *span) for span in spans]
        self._check(example, place, turns[place], "".join(text[a:b] for a, b in spans))
        self.rules[marking.rule] = self.rules.get(marking.rule, 0) + 1
        closings = self._ends_among(self._closing_tokens(text, *spans[-1]))
        return Reply(prompt, text, spans, closings)

    def _attempts(
        self, example: Example, before: list[Message]
    ) -> list[tuple[Marking, list[Message]]]:
        """Marks and turns before the answer to try, in order, to find what the answer adds."""
        source = self.tokenizer.get_chat_template(tools=example.tools)
        if source not in self._markings:
            self._markings[source] = find_marking(self.tokenizer, source)
        markings = [self._markings[source]]
        if markings[0].rule == TRL_MARKS:
            markings.append(UNMARKED)  # TRL's template may render what the model's own does not
        # A template may drop the reasoning before tool calls as soon as an answer follows them.
        bare = [{k: v for k, v in turn.items() if k not in REASONING_FIELDS} for turn in before]
        return [(marking, turns) for turns in (before, bare) for marking in markings]

    def _marked(
        self, example: Example, turns: list[Message], marking: Marking
    ) -> tuple[str, str, list[Span]]:
        """The text before the last turn, the text with it, and its marks.

        Marks may begin within what the prompt gives anyway, and stand in earlier turns.
        """
        before = self._prompt(example, turns[:-1], marking.template)
        text, marks = without_marks(self._render(example, turns, marking.template))
        return without_marks(before)[0], text, marks if marking.template else [(0, len(text))]

    def _check(self, example: Example, place: int, turn: Message, trained: str) -> None:
        refuse_lost_calls(example, place, turn, trained)
        if not self.special_token.sub("", trained).strip():
            raise DataError(
                f"{example.where}: the chat template renders nothing of the assistant's text in "
                f"turn {place + 1}. It may expect another kind of content; choose another template."
            )
        if lost_reasoning(turn, trained):
            self._note(LOST_REASONING, example)

    def _with_end_token(self, text: str, start: int, end: int) -> Span:
        """The span made to close with the end-of-turn token, without white space after it."""
        # Marks may stop before the end token; without it no turn would teach the model to end.
        closing = self._closing_tokens(text, start, end)
        end = closing[-1].end() if closing else end
        following = self.special_token.match(text, end)
        if following and (not closing or not self._ends_among(closing)):
            end = following.end()
        return start, end

    def _closing_tokens(self, text: str, start: int, end: int) -> list[re.Match[str]]:
        """The special tokens that close the text, with nothing but white space among them."""
        closing: list[re.Match[str]] = []
        for match in reversed(list(self.special_token.finditer(text, start, end))):
            if text[match.end() : closing[0].start() if closing else end].strip():
                break
            closing.insert(0, match)
        return closing

    def _ends_among(self, tokens: list[re.Match[str]]) -> list[int]:
        """The ends of the tokens, from the first token on that ends a turn."""
        others = itertools.takewhile(lambda token: token.group() not in self.end_tokens, tokens)
        return [token.end() for token in tokens[len(list(others)) :]]

    def _note(self, reason: str, example: Example) -> None:
        places = self.noted.setdefault(reason, Places())
        if places.last != example.where:
            places.add(example.where)

    @cached_property
    def takes_parts(self) -> bool:
        """True for a template that loses plain text, as some do of models that see images."""
        if "content" not in str(self.tokenizer.chat_template):
            return False
        turn = {"role": "user", "content": PROBE}
        return PROBE not in self._tried(turn) and PROBE in self._tried(in_parts(turn))

    def _tried(self, turn: Message) -> str:
        try:
            return self.tokenizer.apply_chat_template([turn], tokenize=False)
        except Exception:  # whatever a template does with what it was not written for
            return ""

    def _prompt(
        self, example: Example, turns: Sequence[Message], chat_template: str | None = None
    ) -> str:
        return self._render(example, turns, chat_template, add_generation_prompt=True)

    def _render(
        self,
        example: Example,
        turns: Sequence[Message],
        chat_template: str | None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The turns by `chat_template`; None: by the tokenizer's own."""
        import jinja2

        if not turns:
            raise DataError(f"{example.where}: the conversation has no turn before the answer.")
        try:
            return self.tokenizer.apply_chat_template(
                [in_parts(t) if IMAGE in t["content"] or self.takes_parts else t for t in turns],
                tools=example.tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(example.template_options or {}),
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(
                f"{example.where}: the tokenizer's chat template refuses the turns {roles}: "
                f"{error}."
            ) from None


@dataclass
class _Document:
    """A conversation as far as it is rendered; offsets are counted from the text's start."""

    text: str = ""
    spans: list[Span] = field(default_factory=list)
    closings: list[int] = field(default_factory=list)

    def is_continued_by(self, prompt: str) -> bool:
        return bool(self._closings_in(prompt))

    def add(self, reply: Reply) -> None:
        shift = len(reply.prompt)
        if self.spans:  # some templates close the last turn with more tokens than others
            self.spans[-1] = (self.spans[-1][0], self._closings_in(reply.prompt)[-1])
        self.spans += [(start + shift, end + shift) for start, end in reply.spans]
        self.text = reply.prompt + reply.text
        self.closings = [end + shift for end in reply.closings]

    def _closings_in(self, prompt: str) -> list[int]:
        return [end for end in self.closings if prompt.startswith(self.text[:end])]


def _no_reply(example: Example, place: int, prompt: str, text: str) -> DataError:
    if text.startswith(prompt):
        return DataError(
            f"{example.where}: the marks of the chat template leave out turn {place + 1} "
            "(assistant). It must stand in a {% generation %} block, or the template have none."
        )
    same = len(os.path.commonprefix([prompt, text]))  # noqa: RUF071  (of characters)
    given, rendered = (repr(t[same : same + SHOWN_CHARS]) for t in (prompt, text))
    remedy = "Choose another chat template."
    if "<think" in prompt[-SHOWN_CHARS:]:
        remedy = (
            "The template writes a <think> block into the prompt, which the answer has to fit: "
            "with reasoning (reasoning_content, or <think> ... </think> before the text) where "
            "thinking is on, without where it is off. A column chat_template_kwargs, such as "
            '{"enable_thinking": false}, switches it where the template can.'
        )
    return DataError(
        f"{example.where}: the prompt is no prefix of prompt and answer at turn {place + 1} "
        f"(assistant). The chat template gives {given} to the model where it renders the answer as "
        f"{rendered}, so the model would be prompted with what it never saw in training. {remedy}"
    )


def _segments(text: str, spans: list[Span]) -> list[Segment]:
    segments, position = [], 0
    for start, end in spans:
        segments += [Segment(text[position:start]), Segment(text[start:end], trained=True)]
        position = end
    segments[-1] = segments[-1]._replace(ends=True)
    return segments


def refuse_lost_turns(
    example: Example,
    turns: Sequence[Message],
    prompt: str,
    render: Callable[[Example, Sequence[Message]], str],
) -> None:
    """Raise DataError if `prompt` lacks a system, user or tool turn, the tools or earlier calls.

    The text of earlier answers is not looked at: templates shorten it on purpose. Names of tools
    may stand in any text, so tools and calls count as rendered if renaming them changes the prompt.
    """
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant" and not is_rendered(turn["content"], prompt):
            raise _lost(example, f"turn {place + 1} ({turn['role']})")
    if example.tools and render(with_other_tools(example), turns) == prompt:
        raise _lost(example, "the column tools")
    if any(map(call_names, turns)) and render(example, with_other_calls(turns)) == prompt:
        raise _lost(example, "the calls of tools in earlier turns")


def refuse_lost_calls(example: Example, place: int, turn: Message, reply: str) -> None:
    """Raise DataError for a tool call that the rendered turn does not hold."""
    called = reply.replace(turn["content"], "") if turn["content"] else reply
    for name in call_names(turn):
        if name not in called:
            raise _lost(example, f"the call of '{name}' in turn {place + 1}")


def _lost(example: Example, what: str) -> DataError:
    return DataError(
        f"{example.where}: the chat template leaves out {what}. Take the tokenizer of a model "
        "whose template renders it, or remove it from the data."
    )
