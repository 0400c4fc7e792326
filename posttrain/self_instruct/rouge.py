"""ROUGE-L between short texts, and a pool that tells whether a new text is too like its own.

    pool = NoveltyPool(seed_instructions, threshold=0.7)
    if (found := pool.too_similar(text)) is None:
        pool.add(text)

ROUGE-L is the F1 of the longest common subsequence of tokens (Lin 2004), tokens being runs of a-z
and 0-9 in lower case, unstemmed: rouge_score's RougeScorer(["rougeL"]). Each token becomes one
character, so that rapidfuzz compares texts as strings. The pool compares with few of its texts:
a bound on the common subsequence, from 256-bit sets of tokens, rules out the others, exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

TOKEN = re.compile(r"[a-z0-9]+")
SET_WORDS = 4  # of 64 bits: wide enough that instructions of 100 words still differ in many bits
FIRST_CAPACITY = 1024
# Far above what float32 rounds away (texts of 10,000 tokens: 0.001), far below one token.
SLACK = 0.01


class Similar(NamedTuple):
    """The most similar text of a pool, and its ROUGE-L F1."""

    score: float
    text: str


def rouge_tokens(text: str) -> list[str]:
    """Runs of a-z and 0-9, in lower case."""
    return TOKEN.findall(text.lower())


def rouge_l(one: str, other: str) -> float:
    """ROUGE-L F1 of two texts, in [0, 1]; 0 when either has no token.

    F1 of precision L/m and recall L/n is 2L/(m+n). `a b c d` and `a c b d`: L = 3, F1 = 0.75.
    """
    tokens, others = rouge_tokens(one), rouge_tokens(other)
    return _f1(LCSseq.similarity(tokens, others), len(tokens), len(others))


class NoveltyPool:
    """Texts, and the question whether another is more like one of them than `threshold`.

    threshold: the largest F1 that still counts as new, in [0, 1]; at exactly 0.7 a text passes
    with the default, as in Self-Instruct's code (its paper says "less than").
    """

    def __init__(self, texts: Iterable[str] = (), *, threshold: float = 0.7) -> None:
        self.threshold = threshold
        self.texts: list[str] = []
        self._strings: list[str] = []
        self._characters: dict[str, str] = {}  # token -> the character that stands for it
        self._sets = numpy.zeros((SET_WORDS, FIRST_CAPACITY), dtype=numpy.uint64)
        self._lengths = numpy.zeros(FIRST_CAPACITY, dtype=numpy.float32)
        self._spares = numpy.zeros(FIRST_CAPACITY, dtype=numpy.float32)
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str) -> None:
        """Add a text, whether or not it is like another one."""
        place, string = len(self.texts), self._string(text)
        if place == len(self._lengths):
            self._grow()
        bits, spare = _token_set(string)
        self._sets[:, place] = bits
        self._lengths[place], self._spares[place] = len(string), spare
        self.texts.append(text)
        self._strings.append(string)

    def too_similar(self, text: str) -> Similar | None:
        """The most similar text, if its F1 is above the threshold; of equal ones the first."""
        string = self._string(text)
        candidates = self._candidates(string) if string else []
        if not len(candidates):
            return None
        strings = [self._strings[place] for place in candidates]
        common = process.cdist([string], strings, scorer=LCSseq.similarity, dtype=numpy.int32)[0]
        scores = [
            _f1(int(length), len(string), len(other))
            for length, other in zip(common, strings, strict=True)
        ]
        best = max(range(len(scores)), key=scores.__getitem__)
        if scores[best] <= self.threshold:
            return None
        return Similar(scores[best], self.texts[candidates[best]])

    def _candidates(self, string: str) -> numpy.ndarray:
        """Indices of the texts whose F1 may be above the threshold.

        Tokens in a bit that the other text lacks match nothing. A text with n tokens and b bits
        thus has at most n - b + x tokens in common with one that shares x of its bits; n - b are
        its spares. That bounds L from either side, and F1 > t needs 2L > t(m + n).
        """
        size = len(self.texts)
        bits, spare = _token_set(string)
        shared = numpy.zeros(size, dtype=numpy.uint16)
        for word, own in zip(self._sets, bits, strict=True):
            if own:
                shared += numpy.bitwise_count(word[:size] & own)
        needed = self.threshold * (self._lengths[:size] + numpy.float32(len(string))) - SLACK
        most = 2 * (shared + numpy.minimum(self._spares[:size], numpy.float32(spare)))
        return numpy.flatnonzero(most > needed)

    def _string(self, text: str) -> str:
        known = self._characters
        # Python has 1,114,112 characters; 50,000 instructions have some 20,000 different tokens.
        return "".join(known.setdefault(t, chr(len(known))) for t in rouge_tokens(text))

    def _grow(self) -> None:
        room = len(self._lengths)
        self._sets = numpy.pad(self._sets, ((0, 0), (0, room)))
        self._lengths = numpy.pad(self._lengths, (0, room))
        self._spares = numpy.pad(self._spares, (0, room))


def _token_set(string: str) -> tuple[numpy.ndarray, int]:
    """(SET_WORDS words of bits, tokens beyond one per bit); common tokens are spread evenly."""
    width = 64 * SET_WORDS
    bits = 0
    for character in string:
        bits |= 1 << (ord(character) % width)
    words = numpy.frombuffer(bits.to_bytes(width // 8, "little"), dtype="<u8")
    return words, len(string) - bits.bit_count()


def _f1(common: int, length: int, other_length: int) -> float:
    # One division, rounded once: 63 of 90 is the float 0.7 itself, and not above it.
    return 2 * common / (length + other_length) if common else 0.0
