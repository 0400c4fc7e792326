r"""Unicode in answers as ASCII and LaTeX: "½" is 1/2, "²" is ^{2}, "√" is \sqrt, "≤" is \le.

plain_characters("5² ≤ 3½")   # "5^{2} \\le  3 1/2"
"""

from __future__ import annotations

import unicodedata

_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta",
    "λ": "lambda", "μ": "mu", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi",
    "ϕ": "phi", "ω": "omega", "Δ": "Delta", "Ω": "Omega",
}  # fmt: skip
_COMMANDS = {
    "×": "times", "·": "cdot", "⋅": "cdot", "∙": "cdot", "÷": "div", "±": "pm", "∓": "mp",
    "√": "sqrt", "∞": "infty", "≤": "le", "⩽": "le", "≥": "ge", "⩾": "ge", "≠": "ne",
    "≈": "approx", "∪": "cup", "∩": "cap", "∈": "in", "∅": "emptyset", "∖": "setminus",
    "≡": "equiv", "∠": "angle", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil",
    "→": "to", "⟨": "langle", "⟩": "rangle", "∧": "land", "∨": "lor", "°": "degree",
}  # fmt: skip
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
_AFTER = str.maketrans(_SIGNS | {sign: f"\\{name} " for sign, name in (_COMMANDS | _GREEK).items()})


def plain_characters(text: str) -> str:
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
        letter = _BLACKBOARD.get(character)
        pieces.append(rf"\mathbb{{{letter}}}" if letter else character)
        previous = character
    pieces.append("}" if level else "")
    return unicodedata.normalize("NFKC", "".join(pieces)).translate(_AFTER)
