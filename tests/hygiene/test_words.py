"""What counts in a comparison, by hand."""

import pytest

from posttrain.hygiene.rows import digits_and_signs, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't PANIC -- 42!", ["dont", "panic", "42"]),
        ("don’t_panic", ["dont", "panic"]),
        ("Straße ﬁne", ["strasse", "fine"]),
        ("cafe\u0301 ＡＢＣ", ["café", "abc"]),  # an accent apart from its letter; wide letters
        ("GPT模型好", ["gpt", "模", "型", "好"]),  # no spaces: each character is a word
        ("?!", []),
    ],
)
def test_words_are_letters_and_digits_without_case(text, words):
    assert words_of(text) == words


def test_digits_and_signs_keep_their_order_and_lose_what_separates_them():
    assert digits_and_signs("2 + 2 = 4, not 1,000.") == "2+2=41000"
    assert digits_and_signs("What is 5 + 3?") != digits_and_signs("What is 3 + 5?")
    assert digits_and_signs("costs $1.50") == digits_and_signs("costs 150")
