"""Generation marks: which characters of a rendered turn a chat template calls the assistant's.

`{% generation %}` marks stand in few stock templates; without them transformers' assistant mask is
all zeros. For the known templates that lack them TRL, where it is installed, has a training
template: the same text with marks.
"""

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
