"""The example shown is the one trained on, with its marks at the trained tokens."""

import io

import pytest
from rich.console import Console

from posttrain.data import load_documents
from posttrain.errors import ConfigError, DataError
from posttrain.hygiene.report import find_row, pieces_of, print_example, tokens_of
from posttrain.hygiene.rows import RowStream

ROWS = [
    {"instruction": "Say hello.", "output": "Hello!"},
    {"instruction": "What is 2 + 2?", "output": "4 €"},
]


def shown(write, tokenizer, rows=ROWS, *, number=2, colour=False, boundaries=False, **options):
    row = find_row(RowStream([write(rows)]), number)
    parts = tokens_of(row, tokenizer, max_length=512, **options)
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=colour, soft_wrap=True, highlight=False)
    print_example(parts, tokenizer, boundaries=boundaries, console=console)
    return stream.getvalue(), parts


def test_the_tokens_are_those_of_the_loader(write, tokenizer):
    _, ((name, ids, trained),) = shown(write, tokenizer)
    documents = load_documents(write(ROWS), tokenizer, say=lambda _: None)
    assert name == "document"
    assert ids == documents[1]["input_ids"]
    assert trained == documents[1]["trained"]


def test_without_colour_marks_stand_around_what_is_trained(write, tokenizer):
    text, _ = shown(write, tokenizer)
    assert text.endswith("What is 2 + 2?\n\n### Response:«4 €<|endoftext|>»\n")
    assert text.count("«") == 2  # in the legend, and before the answer


def test_in_colour_trained_tokens_are_green_and_special_ones_reversed(write, tokenizer):
    text, _ = shown(write, tokenizer, colour=True)
    assert "«" not in text
    assert "\x1b[1;32m4" in text
    assert "\x1b[1;7;32m<|endoftext|>" in text
    assert "\x1b" not in text.split("What is")[0].split("\n", 1)[1]  # the prompt is plain


def test_boundaries_stand_between_tokens_and_never_within_a_character(write, tokenizer):
    """The euro sign takes three tokens of a byte each."""
    text, ((_, ids, trained),) = shown(write, tokenizer, boundaries=True)
    pieces = pieces_of(ids, trained, tokenizer)
    assert [piece.text for piece in pieces][-4:] == ["4", " ", "€", "<|endoftext|>"]
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    assert text.rstrip("\n").endswith("«4│ │€│<|endoftext|>»")


def test_a_character_that_is_trained_in_part_is_not_joined_across_the_edge(tokenizer):
    ids = tokenizer("€", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    pieces = pieces_of(ids, [False, True, True], tokenizer)
    assert [piece.trained for piece in pieces] == [False, True]


def test_every_turn_that_is_trained_is_marked(write, chat_tokenizer):
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    text, _ = shown(write, chat_tokenizer, rows, number=1)
    assert "«2<|endoftext|>»" in text
    assert "«4<|endoftext|>»" in text
    assert "«1" not in text


def test_pairs_are_shown_in_their_parts(write, tokenizer):
    rows = [{"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}]
    text, parts = shown(write, tokenizer, rows, number=1, template="plain")
    assert [name for name, *_ in parts] == ["prompt", "chosen", "rejected"]
    assert "«4<|endoftext|>»" in text
    assert "«5<|endoftext|>»" in text
    prompts, _ = shown(write, tokenizer, rows, number=1, need="prompts", template="plain")
    assert "«" not in prompts.split("\n", 1)[1]


def test_what_is_not_there_is_an_error(write, tokenizer):
    with pytest.raises(DataError, match="no row 9; the last one is row 2"):
        shown(write, tokenizer, number=9)
    with pytest.raises(ConfigError, match="this row gives documents or prompts; found 'pairs'"):
        shown(write, tokenizer, need="pairs")
    with pytest.raises(DataError, match="with an empty answer"):
        shown(write, tokenizer, [{"instruction": "a", "output": ""}], number=1)
