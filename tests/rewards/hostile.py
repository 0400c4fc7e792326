"""Texts that try to hang, crash or fool a verifier of maths answers: a seeded generator."""

import random

FRAGMENTS = [
    "9", "99999999999", "0", "1e999999", "0.1", "x", "X", "i", "e", "pi", "n", "+", "-", "*", "/",
    "^", "**", "=", "<", ">", ",", ";", ":", "!", "|", "'", "%", "$", "&", "#", "@", "~", "_",
    "\\", "\n", "(", ")", "[", "]", "{", "}", r"\{", r"\}", "^{", "_{", "{}", "()", "9^{9^{9^9}}",
    "9**9**9", "(9^9)^9", "((2^9)^9)^9", "9!", "999!", "(9!)!", "9!!!", r"\frac{1}{0}", r"\frac",
    r"\frac12", r"\frac{1}{", r"\sqrt{", r"\sqrt[9999]{2}", r"\sqrt",
    r"\sum_{k=1}^{999999999} k^k", r"\sum_{n=1}^{\infty} \frac{1}{n^2}", r"\prod_{k=1}^{10^9} k",
    r"\int_0^\infty e^{-x^2} dx", r"\lim_{x \to 0} \frac{\sin x}{x}",
    r"\binom{99999999}{49999999}", r"\begin{pmatrix}", r"\end{pmatrix}", r"1 & 2 \\ 3 & 4",
    r"\left(", r"\right)", r"\text{", r"\text{or}", " or ", " and ", r"\boxed{", "}", r"\pm",
    r"\mp", r"\cup", r"\in", r"\infty", r"\emptyset", r"\mathbb{R}", r"\ne", r"\le", r"\approx",
    r"\log_", r"\sin", r"\arcsin 2", r"\zeta(3)", r"\Gamma(0.5)", r"\operatorname{",
    "exec('import os')", "__import__('os').system('kill -9 0')", "eval(1)", "lambda: 0",
    "os.abort()", "½", "²", "√", "∞", "≤", "\u202e", "\ufdfa", "\ud800", "\x00", "١٢", "９",
    "dollars", "cm^2", "_7", "the answer is", "\u00a0", "...", "0.\\overline{3}", "x^{1000000}",
    "(x+1)^{99999}", "(x+y+z)^{500}", r"\sin(\sin(\sin(x)))", r"e^{e^{e^{x}}}",
    r"\frac{d^{99}}{dx^{99}} x^x", "10^{10^{10}}",
]  # fmt: skip
GOLDS = [
    "5", "18", r"\frac{1}{2}", "x^2 + 1", r"\{1, 2\}", "(1, 2)", "[0, 1)", "x > 5", "B", r"\pi",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "y = 2x + 1", r"1 \pm \sqrt{2}", "204_5",
]  # fmt: skip


def hostile_texts(count, seed):
    """(gold, answer) pairs: fragments in a row, one of them many times, or one in many brackets."""
    chance = random.Random(seed)
    for _ in range(count):
        fragment = chance.choice(FRAGMENTS)
        kind = chance.random()
        if kind < 0.7:
            answer = "".join(chance.choices(FRAGMENTS, k=chance.randint(1, 12)))
        elif kind < 0.85:
            answer = fragment * chance.randint(2, 300)
        else:
            opening = chance.choice(
                ["(", "{", r"\sqrt{", r"\frac{1}{", "x^{", r"\{", "[", "2^{", "("]
            )
            depth = chance.randint(1, 60)
            answer = opening * depth + fragment + "}" * depth
            if opening in "([":
                answer = answer.replace("}", {"(": ")", "[": "]"}[opening])
        yield chance.choice(GOLDS), answer
