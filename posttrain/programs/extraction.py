"""Extracting the program from a text by string operations, linear in the text's length.

    extract_code("So:\\n```python\\nprint(6 * 7)\\n```").code      # "print(6 * 7)\\n"

The program is the last block fenced as Python, else the last fenced without a language, else the
whole text. A fence that is not closed holds no program. The text is not parsed, because parsing
untrusted text can crash the process that does it; running it shows whether it is Python.
"""

from __future__ import annotations

import re
import textwrap
from typing import NamedTuple

MAX_CODE_CHARS = 100_000
FENCE = "```"
PYTHON_TAGS = ("python", "python3", "py")


class Code(NamedTuple):
    """The program as written, or the problem that leaves none."""

    code: str
    problem: str = ""


def extract_code(text: str) -> Code:
    """Extract the program from the final text of a completion."""
    code = _fenced(text) if FENCE in text else text
    if code is None:
        return Code("", "the last fence is not closed")
    if not code.strip():
        return Code("", "empty")
    if len(code) > MAX_CODE_CHARS:
        return Code("", f"over {MAX_CODE_CHARS} characters")
    return Code(code)


def _fenced(text: str) -> str | None:
    """Return the body of the last Python block, else of the last untagged one; None if cut off."""
    tagged = untagged = ""
    body: list[str] | None = None  # lines of the open block
    tag, indent = "", 0
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if body is None and stripped.startswith(FENCE):
            body, tag = [], stripped.strip("`").strip().lower()
            indent = len(line) - len(line.lstrip(" "))
        elif body is not None and stripped == FENCE:
            if tag in PYTHON_TAGS:
                tagged = "".join(body)
            elif not tag:
                untagged = "".join(body)
            body = None
        elif body is not None:
            is_blank_margin = not line[:indent].strip(" ")
            body.append(line[indent:] if is_blank_margin else line)
    return None if body is not None else tagged or untagged


def complete_function(prompt: str, entry_point: str, code: str) -> str:
    """Complete the head of a function that a problem gives with the code that it asks for.

    A body continues the head. A whole function follows it, so that it replaces the head and can use
    what the prompt defines beside it.

    Args:
        prompt: Source that ends in the head of the function.
        entry_point: The function's name.
        code: The body of the function, or a program that defines it.
    """
    name = re.escape(entry_point)
    if not re.search(rf"^(?:async\s+)?(?:def\s+)?{name}\b", code, re.MULTILINE):
        is_indented = code.lstrip("\r\n")[:1].isspace()
        return prompt + (code if is_indented else textwrap.indent(code, "    "))
    if "from __future__ import" in code:  # allowed at a file's beginning only
        return code
    return f"{prompt}\n\n{code}"
