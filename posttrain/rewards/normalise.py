"""One spelling for answers that are written differently and mean the same.

    normalise(r"$\\dfrac12$.")   # "\\frac{1}{2}"

Only spelling: Unicode forms, signs, LaTeX spacing and wrappers. What a text is worth is decided by
`numerals.read_number` and `math.verify_math`.
"""

from __future__ import annotations

import re
import unicodedata

MAX_NESTED_WRAPPERS = 4  # \text{\text{…}}; deeper is not an answer, and each layer costs one pass

_SIGNS = str.maketrans(
    {
        "\u2212": "-",  # minus
        "\u2010": "-",  # hyphen
        "\u2012": "-",  # figure dash
        "\u2013": "-",  # en dash
        "\u2044": "/",  # fraction slash, what NFKC makes of a vulgar fraction
        "\u2215": "/",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u22c5": r"\cdot ",
    }
)
# A thin or hard space, or a LaTeX one, before exactly three digits groups thousands.
_THOUSANDS = re.compile(
    r"(?<=[0-9])(?:\{,\}|,?\\!|\\[,;: ]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))"
)
_REWRITES = [
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|textstyle)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:quad|qquad)(?![A-Za-z])|\\[,;: ]|~"), " "),
    (re.compile(r"\\!|\\?\$|\\[()\[\]]"), ""),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"([\^_])\s*\{([A-Za-z0-9])\}"), r"\1\2"),
    (re.compile(r"\s+"), " "),
]
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boxed|fbox)\s*\{([^{}]*)\}"
)
_DOUBLE_BRACES = re.compile(r"\{\s*\{([^{}]*)\}\s*\}")
_FREE_SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")


def normalise(text: str) -> str:
    """The answer in its one spelling; white space collapsed, not removed ("1 1/2" needs its)."""
    text = _THOUSANDS.sub(",", text)
    if not text.isascii():
        text = _plain_characters(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    for _ in range(MAX_NESTED_WRAPPERS):
        text = _DOUBLE_BRACES.sub(r"{\1}", _WRAPPER.sub(r"\1", text))
    text = text.strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for _ in range(MAX_NESTED_WRAPPERS):
        if _is_wrapped(text):
            text = text[1:-1].strip()
    return text


def text_key(normalised: str) -> str:
    """What is compared where texts are: without spaces, but for those that part two digits."""
    return _FREE_SPACE.sub("", normalised)


def _plain_characters(text: str) -> str:
    """NFKC, but raised and lowered characters stay so and a mixed number keeps its space.

    NFKC alone turns "5²" into "52" and "1½" into "11/2".
    """
    pieces = []
    previous, level = "", ""
    for character in text:
        kind, _, _ = unicodedata.decomposition(character).rpartition(">")
        raised = {"<super": "^", "<sub": "_"}.get(kind, "")
        if raised != level:
            pieces.append(("}" if level else "") + (raised + "{" if raised else ""))
            level = raised
        if kind == "<fraction" and previous.isdigit():
            pieces.append(" ")
        pieces.append(character)
        previous = character
    pieces.append("}" if level else "")
    return unicodedata.normalize("NFKC", "".join(pieces)).translate(_SIGNS)


def _is_wrapped(text: str) -> bool:
    """Does the first brace close with the last one?"""
    if not (text.startswith("{") and text.endswith("}")):
        return False
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position == len(text) - 1
    return False
