"""Token ids as the tokenizer gives them, and documents of more tokens than fit."""

import itertools

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from posttrain.data import load_documents
from posttrain.data.encode import BATCH_ROWS, Encoder, cut, longest_sequence
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


def test_ids_are_those_that_a_call_of_the_tokenizer_gives_whatever_was_asked_of_it_before(
    make_tokenizer,
):
    tokenizer = make_tokenizer(adds_bos=True)
    texts = ["a b", "", "é <s>x</s>", "long " * 9]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    encoder = Encoder(tokenizer)
    tokenizer.pad_token = "</s>"
    tokenizer(texts, truncation=True, max_length=3, padding=True, split_special_tokens=True)
    assert encoder.prompts(texts, add_bos=False) == expected
    tokenizer.split_special_tokens = True
    assert encoder.prompts(["<s>"], add_bos=False) == [[*tokenizer("<s>")["input_ids"][1:]]]


def test_a_tokenizer_with_a_way_of_its_own_is_called(tokenizer):
    class Reversed(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *arguments, **settings):
            turned = text[::-1] if isinstance(text, str) else [each[::-1] for each in text]
            return super()._encode_plus(turned, *arguments, **settings)

    other = Reversed(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    (ids,) = Encoder(other).prompts(["abc"], add_bos=False)
    assert tokenizer.decode(ids) == "cba"


def test_a_prompt_joins_its_answer_where_a_token_of_both_together_lies_across():
    """Every cut of a text; the expected ones from where its tokens end."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained("data/tiny_tokenizer")
    text = "instruction that"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = set(itertools.accumulate(len(tokenizer.decode([token])) for token in ids))
    cuts = range(1, len(text))
    found = Encoder(tokenizer).joins([(text[:cut], text[cut:]) for cut in cuts])
    assert len(ends) < len(text)
    assert found == [cut not in ends for cut in cuts]


def test_the_longest_sequence_is_a_prompt_with_its_longer_completion():
    """By hand: 1 + max(2, 5) = 6 in a later batch; 4 + 1 = 5 in the first."""
    first, last = ([0] * 4, [0], []), ([0], [0] * 2, [0] * 5)
    rows = [first] * (BATCH_ROWS + 1) + [last]
    pairs = Dataset.from_list([dict(zip("pcr", row, strict=True)) for row in rows])
    assert longest_sequence(pairs, "p", "c", "r") == 6
    assert longest_sequence(pairs.select(range(3)), "p", "c", "r") == 5
