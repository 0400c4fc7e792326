"""What counts in a comparison, by hand; and files of all types as streams of rows."""

import pytest

from posttrain.errors import DataError
from posttrain.hygiene.rows import RowStream, digits_and_signs, words_of

WORDS = {
    "Don't PANIC -- 42!": ["dont", "panic", "42"],
    "don’t_panic": ["dont", "panic"],
    "Straße ﬁne": ["strasse", "fine"],
    "cafe\u0301 ＡＢＣ": ["café", "abc"],  # an accent apart from its letter; wide letters
    "GPT模型好": ["gpt", "模", "型", "好"],  # no spaces: each character is a word
    "?!": [],
}


def test_words_are_letters_and_digits_without_case():
    assert {text: words_of(text) for text in WORDS} == WORDS


def test_digits_and_signs_keep_their_order_and_lose_what_separates_them():
    assert digits_and_signs("2 + 2 = 4, not 1,000.") == "2+2=41000"
    assert digits_and_signs("What is 5 + 3?") != digits_and_signs("What is 3 + 5?")
    assert digits_and_signs("costs $1.50") == digits_and_signs("costs 150")


def test_a_folder_as_input_is_refused_and_files_of_all_types_are_streamed(tmp_path):
    (tmp_path / "a.csv").write_text("text\none\n")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    stream = RowStream([tmp_path / "a.csv", tmp_path / "b.jsonl"])
    for _ in range(2):  # as often as one likes
        assert [row.text("text") for row in stream] == ["one", "two"]
    with pytest.raises(DataError, match="a folder; expected files"):
        RowStream([tmp_path])
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        list(RowStream([tmp_path / "c.jsonl"]))
