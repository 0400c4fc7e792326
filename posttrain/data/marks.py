"""Where a chat template puts what is trained: its generation marks, and the tokens that end a turn."""

import functools
import re
from typing import Any, NamedTuple

Span = tuple[int, int]  # first character, and the one after the last
OPEN_MARK, CLOSE_MARK = "\U000f0a01", "\U000f0a02"  # private characters that no text holds
GENERATION_TAG = re.compile(r"{%(?P<left>[-+]?)\s*(?P<end>end)?generation\s*(?P<right>[-+]?)%}")
OWN_MARKS, TRL_MARKS = "the chat template's marks", "the marks of TRL's training template"


class Marking(NamedTuple):
    """A chat template that prints its marks (None: it has none), and where the marks are from."""

    template: str | None
    rule: str


UNMARKED = Marking(None, "what it adds to its prompt")


def find_marking(tokenizer: Any, source: str) -> Marking:
    """The marks of the chat template `source`: its own, else those of TRL's training template."""
    marked = GENERATION_TAG.sub(_visible_mark, source)
    if marked != source:
        return Marking(marked, OWN_MARKS)
    if isinstance(tokenizer.chat_template, str):  # TRL looks at the one template that it can see
        training = _training_template(tokenizer)
        if training:
            return Marking(GENERATION_TAG.sub(_visible_mark, training), TRL_MARKS)
    return UNMARKED


def without_marks(marked: str) -> tuple[str, list[Span]]:
    """The text, and the spans that stood between marks; spans that touch are one."""
    text, spans = "", []
    for piece in marked.replace(CLOSE_MARK + OPEN_MARK, "").split(OPEN_MARK):
        inside, closed, after = piece.partition(CLOSE_MARK)
        if closed:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return text, spans


def _training_template(tokenizer: Any) -> str | None:
    """TRL's training template for the tokenizer's own; None without TRL, or where it has none."""
    find = _trl_lookup()
    if find is None:
        return None
    import jinja2

    try:
        return find(tokenizer)
    except (ValueError, jinja2.TemplateError):  # unknown to TRL, or it refuses TRL's probes
        return None


@functools.cache
def _trl_lookup() -> Any:
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        return None
    return get_training_chat_template


def _visible_mark(tag: re.Match[str]) -> str:
    """A statement block that prints a mark and trims white space as the generation tag does."""
    mark = CLOSE_MARK if tag["end"] else OPEN_MARK
    return f"{{%{tag['left']} if true %}}{mark}{{% endif {tag['right']}%}}"


MARK = "an-answer"  # text that no chat template writes by itself
CALL = {"type": "function", "id": "call00001", "function": {"name": MARK, "arguments": {}}}


def turn_end_ids(tokenizer: Any) -> set[int]:
    """Special tokens that the chat template puts after an assistant's turn, if it has one.

    Those after an answer, and the last one after a tool call: others there are part of the call.
    Where a turn ends with what opens the next one, only a training template may say so.
    """
    if not getattr(tokenizer, "chat_template", None):
        return set()
    turns = {"content": MARK}, {"content": "", "tool_calls": [CALL]}
    after_text, after_call = (_special_after_mark(tokenizer, turn) for turn in turns)
    if not after_text:
        marked = find_marking(tokenizer, tokenizer.get_chat_template()).template
        options = {"chat_template": marked}
        after_text, after_call = (_special_after_mark(tokenizer, t, **options) for t in turns)
    return {*after_text, *after_call[-1:]}


def _special_after_mark(tokenizer: Any, answer: dict[str, Any], **options: Any) -> list[int]:
    import jinja2

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError):  # a template that knows no calls, or wants more turns
        return []
    _, found, after = without_marks(text)[0].rpartition(MARK)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in ids if i in special]
