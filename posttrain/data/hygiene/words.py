"""What of a text counts when texts are compared: its words, and its digits and signs.

Case, punctuation and spacing do not count. Digits and mathematical signs count exactly, in their
order: "Tom has 3 apples" and "Tom has 4 apples" are two problems, however much they look alike.
"""

import re
import unicodedata

# Scripts that write no spaces between words: each character is taken for a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")
APOSTROPHE = re.compile("['’`´]")  # "don't" is one word, and the same as "dont"
DIGIT_OR_SIGN = re.compile(r"[\d+<=>^×÷√±≤≥≠]")


def normalised(text: str) -> str:
    """The text without case, apostrophes and typographic variants of letters."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return APOSTROPHE.sub("", text).casefold()


def words_of(text: str) -> list[str]:
    """By hand: `words_of("Don't PANIC -- 42!") == ["dont", "panic", "42"]`."""
    return WORD.findall(normalised(text))


def digits_and_signs(text: str) -> str:
    """By hand: `digits_and_signs("2 + 2 = 4, not 1,000.") == "2+2=41000"`."""
    return "".join(DIGIT_OR_SIGN.findall(text))
