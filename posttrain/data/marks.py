"""Generation marks: which characters of a rendered turn a chat template calls the assistant's.

    marking = find_marking(tokenizer, tokenizer.get_chat_template())
    text, spans = without_marks(rendered)    # rendered with marking.template

`{% generation %}` marks stand in few stock templates; without them transformers' assistant mask is
all zeros. For known templates that lack them TRL, where it is installed, has a training template:
the same text with marks. `turn_end_ids` finds the tokens with which a template ends a turn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from posttrain.data.example import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # first character, and the one after the last
OPEN_MARK, CLOSE_MARK = "\ufdd1", "\ufdd2"  # that Unicode keeps out of texts
GENERATION_TAG = re.compile(r"{%(?P<left>[-+]?)\s*(?P<end>end)?generation\s*(?P<right>[-+]?)%}")
OWN_MARKS, TRL_MARKS = "the chat template's marks", "the marks of TRL's training template"

# A text and a call that no chat template writes by itself, to find what is put after them.
PROBE = "an-answer"
PROBE_CALL = {"type": "function", "id": "call00001", "function": {"name": PROBE, "arguments": {}}}


class Marking(NamedTuple):
    """A chat template that prints its marks (None: it has none), and the source of the marks."""

    template: str | None
    rule: str


UNMARKED = Marking(None, "what it adds to its prompt")


def find_marking(tokenizer: PreTrainedTokenizerBase, source: str) -> Marking:
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


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Special tokens that the chat template puts after an assistant's turn, if it has one.

    All of those after a text count, but only the last one after a tool call: the others there are
    part of the call. Where a turn ends with what opens the next one, only a training template may
    say so.
    """
    if not getattr(tokenizer, "chat_template", None):
        return set()
    probes = {"content": PROBE}, {"content": "", "tool_calls": [PROBE_CALL]}
    after_text, after_call = (_special_ids_after(tokenizer, probe) for probe in probes)
    if not after_text:
        marked = find_marking(tokenizer, tokenizer.get_chat_template()).template
        after_text, after_call = (_special_ids_after(tokenizer, probe, marked) for probe in probes)
    return {*after_text, *after_call[-1:]}


def _special_ids_after(
    tokenizer: PreTrainedTokenizerBase, probe: Message, chat_template: str | None = None
) -> list[int]:
    import jinja2

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", **probe}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=chat_template)
    except (jinja2.TemplateError, TypeError):  # a template that knows no calls, or wants more turns
        return []
    _, found, after = without_marks(text)[0].rpartition(PROBE)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in ids if i in special]


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
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
def _trl_lookup() -> Callable[[PreTrainedTokenizerBase], str | None] | None:
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        return None
    return get_training_chat_template


def _visible_mark(tag: re.Match[str]) -> str:
    """A statement block that prints a mark and trims white space as the generation tag does."""
    mark = CLOSE_MARK if tag["end"] else OPEN_MARK
    return f"{{%{tag['left']} if true %}}{mark}{{% endif {tag['right']}%}}"
