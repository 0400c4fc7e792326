"""What happens to documents of more tokens than fit, by hand and as the summary says it."""

import pytest

from posttrain.data import load_documents
from posttrain.data.encode import cut
from posttrain.errors import ConfigError

DOCUMENT = ([7, 8, 9, 1], [False, False, True, True])
ROWS = [{"prompt": "q", "completion": "fits"}, {"prompt": "qu", "completion": "too long"}]


@pytest.mark.parametrize(
    ("truncation", "bos_id", "expected"),
    [
        ("keep_start", None, ([7, 8, 9], [False, False, True])),
        ("keep_end", None, ([8, 9, 1], [False, True, True])),
        ("keep_end", 7, ([7, 9, 1], [False, True, True])),
        ("drop", None, None),
    ],
)
def test_four_tokens_in_three(truncation, bos_id, expected):
    assert cut(DOCUMENT, 3, truncation, bos_id) == expected


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "drop"])
def test_what_fits_is_not_touched(truncation):
    assert cut(DOCUMENT, 4, truncation, 7) == DOCUMENT


def test_the_first_token_kept_is_not_trained_since_nothing_predicts_it():
    assert cut(DOCUMENT, 2, "keep_end", None) == ([9, 1], [False, True])


@pytest.mark.parametrize(
    ("truncation", "texts", "said"),
    [
        ("keep_start", ["qfits</s>", "qutoo "], "50.0% truncated, 1 of them without an end token"),
        ("keep_end", ["qfits</s>", " long</s>"], "50.0% truncated"),
        ("drop", ["qfits</s>"], "dropped 1: 1 longer than 6 tokens (first: row 2)"),
    ],
)
def test_each_way_and_what_the_summary_says(tokenizer, truncation, texts, said, quiet):
    documents = load_documents(
        ROWS, tokenizer, template="plain", max_length=6, truncation=truncation, say=quiet
    )
    assert [tokenizer.decode(ids) for ids in documents["input_ids"]] == texts
    assert said in quiet.lines[0]
    assert ("without an end token" in quiet.lines[0]) == (truncation == "keep_start")


def test_an_answer_that_is_cut_is_never_given_an_end_token(tokenizer, quiet):
    documents = load_documents(ROWS, tokenizer, template="plain", max_length=6, say=quiet)
    assert tokenizer.eos_token_id in documents[0]["input_ids"]
    assert tokenizer.eos_token_id not in documents[1]["input_ids"]
    assert documents[1]["trained"] == [False, False, True, True, True, True]


def test_a_conversation_cut_after_an_earlier_answers_end_is_not_counted_as_unended(
    tokenizer, quiet
):
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    length = len("\n\nHuman: q\n\nAssistant: a") + 1
    (document,) = load_documents(rows, tokenizer, max_length=length, say=quiet)
    assert tokenizer.decode(document["input_ids"]).endswith(" a</s>")
    assert quiet.lines[0].endswith("100.0% truncated")


def test_the_beginning_of_sequence_token_stays_at_the_beginning(bos_tokenizer, quiet):
    (document,) = load_documents(
        ROWS[1:], bos_tokenizer, template="plain", max_length=6, truncation="keep_end", say=quiet
    )
    assert bos_tokenizer.decode(document["input_ids"]) == "<s>long</s>"
    assert document["trained"] == [False] + [True] * 5


def test_an_unknown_way_is_a_config_error(tokenizer):
    with pytest.raises(ConfigError, match="unknown way 'keep'; known: keep_start, keep_end, drop"):
        load_documents(ROWS, tokenizer, truncation="keep")
