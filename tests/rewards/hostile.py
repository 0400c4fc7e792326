"""Texts that try to hang, crash or fool a verifier of maths answers: a seeded generator."""

import random

from tests.cases import read_cases

FRAGMENTS = [case["text"] for case in read_cases(__file__, "math_hostile", kind="fragment")]
GOLDS = [case["text"] for case in read_cases(__file__, "math_hostile", kind="gold")]


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
