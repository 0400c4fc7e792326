"""Reference answers in worked solutions: GSM8K's `#### 18`, LaTeX's `\\boxed{18}`."""

import re

HASHES = re.compile(r"####[ \t]*(?P<gold>\S[^\n]*?)\s*\Z")
THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
BOXED = "\\boxed{"


def reference_answer(text: str) -> tuple[str, str]:
    """The answer that a rule reward compares with, and the rule that found it.

    The rules, in order: what follows `####` on the last line, without the commas of thousands;
    the content of the last `\\boxed{...}`; else the whole text.

    By hand: `reference_answer("2 * 500 = <<2*500=1000>>1000\\n#### 1,000") == ("1000", "####")`.
    """
    if match := HASHES.search(text):
        return THOUSANDS_COMMA.sub("", match["gold"]), "####"
    boxed = last_boxed(text)
    return (boxed, "\\boxed") if boxed is not None else (text.strip(), "whole text")


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}`, braces balanced; None without one."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth = 1
    for end in range(start + len(BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len(BOXED) : end].strip()
    return None


def without_calculator_marks(text: str) -> str:
    """GSM8K's worked text as a person would write it: `<<16-3=13>>` goes, `#### 13` stays.

    Only texts whose last line is `#### ...` are touched: elsewhere `<<...>>` may be code.
    """
    return CALCULATOR_MARK.sub("", text) if HASHES.search(text) else text
