"""Verbs: what instructions ask for, as their root verb and its object, by rules of thumb.

    verb_and_noun("Write a short poem about the sea") == ("write", "poem")

Self-Instruct's paper takes both from a parser. Here an instruction is read from its start: what may
stand before an imperative is passed over ("Given the text, …", "Please", "Can you"), the next word
is the verb, unless it is a question word; the noun is the last word of the first run of content
words after it. Some pairs are wrong; for counting how varied a few hundred instructions are, they
do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def _words(text: str) -> set[str]:
    return set(text.split())


WORD = re.compile(r"[a-z][a-z'-]*|[,.;:?!]")
PUNCTUATION = set(",.;:?!")
POLITE = {"please", "kindly", "now", "then", "next", "first", "briefly", "help", "me"}
QUESTION_WORDS = _words(
    """
    what which who whom whose when where why how is are was were do does did has have should
    would could can will may
    """
)
# A sentence that opens with one of these has its imperative after the first comma.
OPENERS = _words(
    """
    given in for from using with if based imagine suppose as you your here the this these
    below i my we a an there after before without to on at pretend assume out of
    """
)
# Between a verb and its object, or after the object: never a noun.
FUNCTION_WORDS = QUESTION_WORDS | _words(
    """
    a an the this that these those each every all any some both another other no one two three
    four five six seven eight nine ten my your his her its our their me you him it us them i
    we he she they of in on at to for from with without about into by as between through over
    under up out down off and or but so if whether than be been not only following given below
    above after before during using against per there here more most such own must within
    while because since until s also just very
    """
)


def verb_and_noun(instruction: str) -> tuple[str, str]:
    """(root verb or question word, its object); "" for what is not found."""
    words = WORD.findall(instruction.lower())
    start = _imperative(words)
    if start is None:
        return "", ""
    return words[start], _object(words[start + 1 :])


def count_verbs(instructions: Iterable[str]) -> Counter[tuple[str, str]]:
    """Number of instructions for each pair of verb and noun."""
    return Counter(verb_and_noun(instruction) for instruction in instructions)


def _imperative(words: list[str]) -> int | None:
    """Index of the verb or question word that the sentence depends on; None without one."""
    place = 0
    if words and words[0] in OPENERS:
        comma = words.index(",") if "," in words else -1
        place = comma + 1 if comma > 0 else 0
    if words[place + 1 : place + 2] == ["you"] and words[place] in QUESTION_WORDS:
        place += 2  # "can you …" asks for what follows
    while place < len(words) and (words[place] in POLITE or words[place] in PUNCTUATION):
        place += 1
    return place if place < len(words) else None


def _object(words: list[str]) -> str:
    """The last word of the first run of content words; empty without one."""
    found = ""
    for word in words:
        if word not in FUNCTION_WORDS and word not in PUNCTUATION:
            found = word
        elif found:
            break
    return found
