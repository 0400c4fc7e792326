"""The text of a completion, whether it came as a string or as chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Completion = str | Sequence[dict[str, Any]]


def completion_text(completion: Completion) -> str:
    """The answer's text: the string itself, or the content of the last message.

    A message's content may be a string, None (a call without words: empty text), or a list of
    parts, of which those with a `text` are joined.
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content)
