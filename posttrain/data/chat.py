"""Chat templates: which characters of a rendered conversation the model has to learn.

Many stock templates lack the `{% generation %}` marks, and then transformers' assistant mask is
all zeros: training on nothing looks healthy. So: the marks where there are some, else what each
assistant turn adds to the rendered turns before it, else an error.
"""

import os
import re
from typing import Any

from posttrain.data.examples import Example, Message, Segment, with_input
from posttrain.errors import DataError

Span = tuple[int, int]  # first character, and the one after the last
OPEN_MARK, CLOSE_MARK = "\U000f0a01", "\U000f0a02"  # private characters that no text holds
GENERATION_TAG = re.compile(r"{%(?P<left>[-+]?)\s*(?P<end>end)?generation\s*(?P<right>[-+]?)%}")


class ChatTemplate:
    """Renders examples with the tokenizer's own chat template."""

    name = "chat"
    adds_bos = False  # the template writes it

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        source = tokenizer.get_chat_template()
        self.marked_template = GENERATION_TAG.sub(_visible_mark, source)
        self.has_marks = self.marked_template != source
        special = {token for token in tokenizer.all_special_tokens if token}
        special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        if tokenizer.bos_token != tokenizer.eos_token:
            special.discard(tokenizer.bos_token)  # it opens what follows, it ends nothing
        longest_first = sorted(special, key=len, reverse=True)
        self.special_token = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def prompt(self, example: Example) -> str:
        return self._render(example, _turns_with_input(example), add_generation_prompt=True)

    def answers(self, example: Example) -> list[str]:
        """What follows the prompt for each answer, up to and with its end-of-turn token."""
        turns = _turns_with_input(example)
        answers = []
        for answer in example.answers:
            both = [*turns, answer]
            text = self._render(example, both)
            span = self._added_span(example, text, both, len(turns))
            start, end = self._with_end_token(text, *span)
            self._refuse_nothing(example, text[start:end])
            answers.append(text[start:end])
        return answers

    def document(self, example: Example) -> list[Segment]:
        turns = [*_turns_with_input(example), *example.answers]
        first = len(turns) - 1 if example.first_trained is None else example.first_trained
        places = [i for i, t in enumerate(turns) if t["role"] == "assistant" and i >= first]
        if self.has_marks:
            text, spans = self._marked_spans(example, turns, places)
        else:
            text = self._render(example, turns)
            spans = [self._added_span(example, text, turns, place) for place in places]
        spans = [self._with_end_token(text, *span) for span in spans]
        self._refuse_nothing(example, "".join(text[start:end] for start, end in spans))
        return _segments(text, spans)

    def _marked_spans(
        self, example: Example, turns: list[Message], places: list[int]
    ) -> tuple[str, list[Span]]:
        marked = self._render(example, turns, chat_template=self.marked_template)
        text, spans = _without_marks(marked)
        num_answers = sum(turn["role"] == "assistant" for turn in turns)
        # Some templates mark the text and its end token apart; then one cannot tell whose mark
        # is whose, but need not where every answer is trained.
        if len(spans) < num_answers or len(spans) > num_answers > len(places):
            raise DataError(
                f"{example.where}: the chat template marks {len(spans)} generations in a "
                f"conversation with {num_answers} assistant turns. Every assistant turn must "
                "stand in one {% generation %} block."
            )
        if len(places) < num_answers:
            spans = spans[-len(places) :]
        prompts = [
            self._render(example, turns[:place], add_generation_prompt=True)
            for place in places
            if place
        ]
        # Marks may hold what the generation prompt gives anyway, as "<|im_start|>assistant".
        opened = [len(prompt) for prompt in prompts if text.startswith(prompt)]
        return text, [(max([a, *(o for o in opened if a < o < b)]), b) for a, b in spans]

    def _added_span(self, example: Example, text: str, turns: list[Message], place: int) -> Span:
        """Where assistant turn `place` stands in `text`, by rendering with and without it."""
        before = self._render(example, turns[:place], add_generation_prompt=True)
        through = self._render(example, turns[: place + 1])
        start, end = len(before), len(os.path.commonprefix([through, text]))  # noqa: RUF071
        content = turns[place]["content"].strip()
        # The end may be rendered differently on the last turn; the answer itself may not.
        is_whole = end >= len(through.rstrip()) or (content and content in text[start:end])
        if not (through.startswith(before) and text.startswith(before) and is_whole):
            raise DataError(
                f"{example.where}: cannot tell which tokens to train. With an assistant's turn "
                "added, the chat template renders what stands before it differently. For "
                "documents, {% generation %} ... {% endgeneration %} around the assistant's text "
                "in the template helps; else choose another template."
            )
        split = [m.start() for m in self.special_token.finditer(text, start) if m.end() > end]
        return start, min([end, *split])

    def _refuse_nothing(self, example: Example, trained: str) -> None:
        if not self.special_token.sub("", trained).strip():
            raise DataError(
                f"{example.where}: the chat template renders nothing of the assistant's text. It "
                "may expect another kind of content; choose another template."
            )

    def _with_end_token(self, text: str, start: int, end: int) -> Span:
        """The span made to close with the end-of-turn token, without white space after it."""
        ends = [match.end() for match in self.special_token.finditer(text, start, end)]
        if ends and not text[ends[-1] : end].strip():
            return start, ends[-1]
        following = self.special_token.match(text, end)
        return start, following.end() if following else end

    def _render(self, example: Example, turns: list[Message], **options: Any) -> str:
        import jinja2

        if not turns:
            raise DataError(f"{example.where}: the conversation has no turn before the answer.")
        try:
            return self.tokenizer.apply_chat_template(list(turns), tokenize=False, **options)
        except jinja2.TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(
                f"{example.where}: the tokenizer's chat template refuses the turns {roles}: "
                f"{error}."
            ) from None


def _visible_mark(tag: re.Match[str]) -> str:
    """A statement block that prints a mark and trims white space as the generation tag does."""
    mark = CLOSE_MARK if tag["end"] else OPEN_MARK
    return f"{{%{tag['left']} if true %}}{mark}{{% endif {tag['right']}%}}"


def _without_marks(marked: str) -> tuple[str, list[Span]]:
    """The text, and the spans that stood between marks; spans that touch are one."""
    text, spans = "", []
    for piece in marked.replace(CLOSE_MARK + OPEN_MARK, "").split(OPEN_MARK):
        inside, closed, after = piece.partition(CLOSE_MARK)
        if closed:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return text, spans


def _turns_with_input(example: Example) -> list[Message]:
    if not example.input:
        return list(example.turns)
    *before, last = example.turns
    return [*before, {**last, "content": with_input(last["content"], example.input)}]


def _segments(text: str, spans: list[Span]) -> list[Segment]:
    segments, position = [], 0
    for start, end in spans:
        segments += [Segment(text[position:start]), Segment(text[start:end], trained=True)]
        position = end
    segments[-1] = segments[-1]._replace(ends=True)
    return segments
