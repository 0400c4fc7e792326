r"""Finding the final answer in a text, and giving it one spelling.

    last_boxes(r"so \boxed{\frac12}")   # the contents of the boxes that it ends with

    normalise(r"$\dfrac12$.")     # r"\frac{1}{2}"
    plain_characters("5² ≤ 3½")   # "5^{2} \\le  3 1/2"

This concerns spelling only: Unicode forms, signs, LaTeX spacing and wrappers, words for signs.
Unicode becomes ASCII and LaTeX: "½" is 1/2, "²" is ^{2}, "√" is \sqrt, "≤" is \le. The meaning of a
text is for `numerals`, `shapes` and `comparison`. All functions are linear in the text's length.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

# LaTeX commands, each with the characters that stand for it.
_COMMANDS_TABLE = """
    alpha α  beta β  gamma γ  delta δ  epsilon ε  theta θ  lambda λ  mu μ  pi π  rho ρ  sigma σ
    tau τ  phi φ  phi ϕ  omega ω  Delta Δ  Omega Ω
    times ×  cdot ·  cdot ⋅  cdot ∙  div ÷  pm ±  mp ∓  sqrt √  infty ∞  le ≤  le ⩽  ge ≥  ge ⩾
    ne ≠  approx ≈  cup ∪  cap ∩  in ∈  emptyset ∅  setminus ∖  equiv ≡  angle ∠  lfloor ⌊
    rfloor ⌋  lceil ⌈  rceil ⌉  to →  langle ⟨  rangle ⟩  land ∧  lor ∨  degree °
"""
_NAMES_AND_SIGNS = _COMMANDS_TABLE.split()
_COMMANDS = dict(zip(_NAMES_AND_SIGNS[1::2], _NAMES_AND_SIGNS[::2], strict=True))
_SIGNS = {
    "\u2212": "-",  # minus
    "\u2010": "-",  # hyphen
    "\u2012": "-",  # figure dash
    "\u2013": "-",  # en dash
    "\u2044": "/",  # fraction slash, what NFKC makes of a vulgar fraction
    "\u2215": "/",
    "\u2018": "'",
    "\u2019": "'",
    "\u2032": "'",  # prime
    "\u201c": '"',
    "\u201d": '"',
    "\u200b": "",
    "\ufeff": "",
}
_BLACKBOARD = {"ℝ": "R", "ℂ": "C", "ℚ": "Q", "ℤ": "Z", "ℕ": "N"}  # plain letters after NFKC
_AFTER = str.maketrans(_SIGNS | {sign: f"\\{name} " for sign, name in _COMMANDS.items()})

MAX_NESTED_WRAPPERS = 4  # \text{\text{…}}; each layer costs one pass, and no answer is deeper

# A thin or hard space, or a LaTeX one, before exactly three digits groups thousands.
_THOUSANDS = re.compile(
    r"(?<=[0-9])(?:\s?\{\s?,\s?\}\s?|\s?,?\\!\s?|\\[,;: ]|[\u00a0\u2009\u202f])"
    r"(?=[0-9]{3}(?![0-9]))"
)
_NUMERAL = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_WORD = r"(?<![\\A-Za-z]){}(?![A-Za-z])"  # not a command, nor a part of a longer word
_FUNCTIONS = "sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|pi|infty"


def _command(names: str) -> str:
    return rf"\\(?:{names})(?![A-Za-z])"


_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (_command("[dtc]frac"), r"\\frac"),
        (r"\\(?:left|right)\s*\.", ""),
        (_command("left|right|[bB]ig{1,2}[lrm]?|displaystyle|textstyle|limits"), ""),
        (_command("quad|qquad") + r"|(?<!\\)\\[,;:\s]|~", " "),
        (r"(?<!\\)\\[!()\[\]]", ""),
        (r"\\%", "%"),
        (r"[ ]?" + _WORD.format("(?:percentage|percent|per cent|pct)"), "%"),
        (_command("lbrace"), r"\\{"),
        (_command("rbrace"), r"\\}"),
        (_command("leqslant|leqq|leq") + "|=<|<=", r"\\le "),
        (_command("geqslant|geqq|geq") + "|>=", r"\\ge "),
        (_command("neq") + r"|\\not\s*=|!=", r"\\ne "),
        (_command("lt"), "<"),
        (_command("gt"), ">"),
        (_command("approx|simeq|thickapprox"), r"\\approx "),
        (_command("varnothing") + r"|\\\{\s*\\\}", r"\\emptyset "),
        (_command("infin") + "|" + _WORD.format("(?:infinity|inf)"), r"\\infty "),
        (_command("mathds|Bbb") + r"\s*", r"\\mathbb"),
        (r"\\mathbb\s+?(?=[RCQZN](?![A-Za-z]))", r"\\mathbb"),
        (r"\\mathbb([RCQZN])(?![A-Za-z])", r"\\mathbb{\1}"),
        (_command("R"), r"\\mathbb{R}"),
        (r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|" + _command("degree"), r"^\\circ "),
        (_command("dots[cmb]?|[lc]dots"), "..."),
        (r"\*\*", "^"),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (_WORD.format(f"({_FUNCTIONS})"), r"\\\1 "),
    ]
]
# Commands that hold text. The text is unwrapped, and set apart from its neighbours by spaces.
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|[mh]box|boxed|fbox|underline|bm|emph)"
    r"\s*\{([^{}]*)\}"
)
_TOKEN = r"[0-9A-Za-z]|\\[A-Za-z]+"  # what LaTeX accepts as an argument without braces
_SHAPES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (rf"\\(frac|binom)\s*({_TOKEN})\s*({_TOKEN})", r"\\\1{\2}{\3}"),
        (rf"\\(frac|binom)\s*({_TOKEN})\s*\{{", r"\\\1{\2}{"),
        (rf"\\(frac|binom)\s*(\{{[^{{}}]*\}})\s*({_TOKEN})", r"\\\1\2{\3}"),
        (r"\\pmod\s*\{([^{}]*)\}", r"\\pmod \1"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"([\^_])\s*\{\s*([A-Za-z0-9])\s*\}", r"\1\2"),
        (r"(?<=[0-9]) +([ap])\.? ?m\.?(?![A-Za-z])", r" \1m"),
        (r"(?<=[0-9]) ?(?:\^ ?\{ ?)?(?:st|nd|rd|th)(?![A-Za-z])(?: ?\})?", ""),  # ordinals
        (r"\s+", " "),
    ]
]
_DOUBLY_ESCAPED = re.compile(r"\\\\(?=[A-Za-z])")
_DOUBLE_BRACES = re.compile(r"\{\s*\{([^{}]*)\}\s*\}")
_FREE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
_OPENING = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final )?(?:answer|result|solution)"
    r"(?:s are| is|:|=| (?=[0-9\\(-]))+ ?|(?:option|choice|answer) (?=\(?[A-Z]\)?$)",
    re.IGNORECASE,
)


def normalise(text: str) -> str:
    """Give an answer its one spelling. White space is collapsed, not removed: "1 1/2" needs it."""
    if _NUMERAL.fullmatch(plain := text.strip()):  # most answers are, so there is nothing to do
        return plain
    text = _THOUSANDS.sub("", text)
    if not text.isascii():
        text = plain_characters(text)
    text = _without_emphasis(_without_dollar_pairs(text))
    if r"\begin" not in text:
        text = _DOUBLY_ESCAPED.sub(r"\\", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    for _ in range(MAX_NESTED_WRAPPERS):
        text = _DOUBLE_BRACES.sub(r"{\1}", _WRAPPER.sub(r" \1 ", text))
    for pattern, replacement in _SHAPES:
        text = pattern.sub(replacement, text)
    text = _without_end_mark(text.strip())
    text = text[opening.end() :] if (opening := _OPENING.match(text)) else text
    for _ in range(MAX_NESTED_WRAPPERS):
        if _is_wrapped(text):
            text = text[1:-1].strip()
    return text


def plain_characters(text: str) -> str:
    """Apply NFKC, but keep characters raised or lowered, and the space within a mixed number.

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
        letter = _BLACKBOARD.get(character)
        pieces.append(rf"\mathbb{{{letter}}}" if letter else character)
        previous = character
    pieces.append("}" if level else "")
    return unicodedata.normalize("NFKC", "".join(pieces)).translate(_AFTER)


def text_key(normalised: str) -> str:
    """Return a normalised text without the spaces that separate nothing, for comparing texts."""
    return _FREE_SPACE.sub("", normalised)


def _without_dollar_pairs(text: str) -> str:
    r"""Remove the dollars around mathematics. A single one, or `\$`, is money and stays: "$"."""
    if "$" not in text:
        return text
    money = text.replace(r"\$", "\ue000")
    if money.count("$") % 2 == 0:
        money = money.replace("$", " ")
    return money.replace("\ue000", "$")


def _without_emphasis(text: str) -> str:
    text = text.strip()
    while len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2].strip()
    return text.strip('`"')


def _without_end_mark(text: str) -> str:
    while text[-1:] and text[-1] in ".,;:" and not text.endswith(".."):
        text = text[:-1].rstrip()
    return text


def _is_wrapped(text: str) -> bool:
    """Tell whether the first brace is closed by the last one."""
    if not (text.startswith("{") and text.endswith("}")):
        return False
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position == len(text) - 1
    return False


MAX_ZONE_CHARS = 20_000  # an answer stands at the end; only the end of a runaway text is searched

# Escaped braces and backslashes are matched, so that they are not taken for braces.
_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")
# Words that may stand between two boxes that are one answer together.
_BETWEEN_BOXES = {"and", "or", "text", "quad", "boxed", "fbox"}
# The sign belongs to the number unless something is subtracted: the last number of "5-3" is 3.
_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\$?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?(?:\\?%)?")


class Extracted(NamedTuple):
    """The answers as written, one for each box, or the problem that leaves none."""

    answers: list[str]
    problem: str = ""


def boxed(text: str) -> list[str]:
    """Return the bodies of all outermost balanced boxes, in order. Counts braces in one pass."""
    return [text[start:end] for start, end in _box_spans(text)]


def _box_spans(text: str) -> list[tuple[int, int]]:
    open_braces: list[int | None] = []  # where a box's body starts, None for any other brace
    spans: list[tuple[int, int]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token.endswith("{") and token != r"\{":
            open_braces.append(match.end() if len(token) > 1 else None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                while spans and spans[-1][0] > start:  # a box inside this one is part of its body
                    spans.pop()
                spans.append((start, match.start()))
    return spans


def last_boxes(text: str) -> str:
    r"""Join the last box and those right before it: "\boxed{1} and \boxed{2}" is "1, 2".

    Returns "" for a text without a box.
    """
    spans = _box_spans(text)
    run = spans[-1:]
    for start, end in reversed(spans[:-1]):
        if not set(re.findall(r"[\w=+-]+", text[end : run[0][0]])) <= _BETWEEN_BOXES:
            break
        run.insert(0, (start, end))
    return ", ".join(dict.fromkeys(text[start:end] for start, end in run))


def after_hashes(text: str) -> str:
    """Return the first line after the last `####`, as in GSM8K's answers; all without hashes."""
    return text.rpartition("####")[2].strip().partition("\n")[0]


def last_number(text: str) -> str:
    """Return the last numeral of the text, or an empty string."""
    found = ""
    for match in _NUMBER.finditer(text):
        found = match.group()
    return found.rstrip(",")


def extract_answers(
    text: str,
    *,
    is_whole: bool = False,
    allow_hashes: bool = False,
    allow_last_number: bool = False,
) -> Extracted:
    """Extract the final answers from a text.

    Args:
        text: The final text of a completion, or a body of `<answer>`.
        is_whole: Without a box, the whole text is the answer, as in the body of `<answer>`.
        allow_hashes: Lenient: without a box, take what follows the last `####`.
        allow_last_number: Lenient: without box and hashes, take the last numeral. Only for golds
            that are numbers.
    """
    zone = text[-MAX_ZONE_CHARS:]
    if boxes := boxed(zone):
        return Extracted(boxes)
    if allow_hashes and "####" in zone:
        return Extracted([after_hashes(zone)])
    if allow_last_number and (number := last_number(zone)):
        return Extracted([number])
    if is_whole:
        return Extracted([text])
    return Extracted([], r"no <answer> and no \boxed{}")
