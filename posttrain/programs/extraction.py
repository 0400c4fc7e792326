"""Where the program stands in a completion: string work only, linear in the text's length.

    extract_code("<think>easy</think>```python\\nprint(6 * 7)\\n```").code      # "print(6 * 7)\\n"

After the last `</think>`, inside the last `<answer>…</answer>` if there is one: the last block
fenced as Python, else the last fenced without a language, else all of it. A fence, thought or
answer that was begun and not finished holds no program. Whether it is Python shows where it runs:
parsing untrusted text can crash the process that does it.
"""

from __future__ import annotations

import re
import textwrap
from typing import NamedTuple

from posttrain.maths.extraction import final_text

MAX_CODE_CHARS = 100_000
FENCE = "```"
PYTHON_TAGS = ("python", "python3", "py")


class Code(NamedTuple):
    """The program as written, or why there is none."""

    code: str
    problem: str = ""


def extract_code(completion: str, *, prefilled_think: bool = False) -> Code:
    """The program that a completion commits itself to. prefilled_think: it starts in a thought."""
    text = final_text(completion, prefilled_think=prefilled_think)
    if text is None:
        return Code("", "<think> is not closed")
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        text = text[start + len("<answer>") : end]
    elif "<answer>" in text or end >= 0:
        return Code("", "<answer> is not closed, or not opened")
    code = _fenced(text) if FENCE in text else text
    if code is None:
        return Code("", "the last fence is not closed")
    if not code.strip():
        return Code("", "empty")
    if len(code) > MAX_CODE_CHARS:
        return Code("", f"over {MAX_CODE_CHARS} characters")
    return Code(code)


def _fenced(text: str) -> str | None:
    """The body of the last Python block, else of the last without a language; None if cut off."""
    tagged = untagged = ""
    body: list[str] | None = None  # of the block that is open
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
    """The program of a problem that gives the head of a function and asks for the rest.

    A body continues the head. A whole function comes after it, so that it replaces the head and
    can use what stands beside it.
    """
    name = re.escape(entry_point)
    if not re.search(rf"^(?:async\s+)?(?:def\s+)?{name}\b", code, re.MULTILINE):
        is_indented = code.lstrip("\r\n")[:1].isspace()
        return prompt + (code if is_indented else textwrap.indent(code, "    "))
    if "from __future__ import" in code:  # allowed at a file's beginning only
        return code
    return f"{prompt}\n\n{code}"
