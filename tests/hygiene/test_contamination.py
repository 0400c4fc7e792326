"""Overlaps with a benchmark: all planted ones are found, and shown with their words."""

import random

import pytest

from posttrain.errors import DataError
from posttrain.hygiene.contamination import Benchmark, decontaminate
from posttrain.hygiene.rows import RowStream

from .conftest import SHARED, needs_shared, read
from .plants import recased, repunctuated

LONG = "a farmer sells eggs to each of his nine neighbours on every morning of the week for money"
SHORT = "Who wrote Faust?"


def benchmark(write, *texts, **options):
    rows = [{"question": text, "answer": "x"} for text in texts]
    return Benchmark(RowStream([write(rows, "benchmark.jsonl")]), **options)


def overlap_of(found, write, **columns):
    (row,) = RowStream([write([columns])])
    return found.overlap(row)


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_none(write):
    words = LONG.split()
    found = benchmark(write, SHORT, LONG)
    inside = "Once, " + " ".join(words[2:15]).upper() + "!"
    overlap = overlap_of(found, write, text=inside)
    assert overlap.text == " ".join(words[2:15])
    assert overlap.benchmark_row.endswith("benchmark.jsonl, row 2")
    assert overlap.num_places == 1
    twelve = "Once, " + " ".join(words[2:14]) + " he"
    assert overlap_of(found, write, text=twelve) is None
    assert overlap_of(benchmark(write, LONG, num_words=12), write, text=twelve) is not None


def test_the_whole_run_that_is_shared_is_shown(write):
    words = LONG.split()
    overlap = overlap_of(benchmark(write, LONG), write, text="Now " + " ".join(words[:16]) + " me")
    assert overlap.text == " ".join(words[:16])
    assert overlap.num_places == 4


def test_a_short_benchmark_text_must_be_a_text_as_a_whole(write):
    found = benchmark(write, SHORT)
    assert overlap_of(found, write, question="who  wrote FAUST", answer="Goethe").text
    assert overlap_of(found, write, question="Tell me who wrote Faust?", answer="Goethe") is None


def test_answers_and_turns_of_conversations_are_looked_at_too(write):
    found = benchmark(write, LONG)
    turns = [{"role": "user", "content": "Quote!"}, {"role": "assistant", "content": LONG}]
    assert overlap_of(found, write, messages=turns) is not None
    assert overlap_of(found, write, prompt="Quote!", chosen="no", rejected=LONG) is not None


def test_named_columns_alone_are_looked_at_and_must_be_there(write):
    found = benchmark(write, LONG)
    (row,) = RowStream([write([{"prompt": "Quote!", "completion": LONG}])])
    assert found.overlap(row, ["prompt"]) is None
    assert found.overlap(row, ["completion"]) is not None
    with pytest.raises(DataError, match="none of the columns anwser is filled"):
        found.overlap(row, ["anwser"])


def test_removal_keeps_order_and_writes_what_went_with_its_reason(write, output):
    rows = [{"question": text, "answer": "1"} for text in ("a b", LONG, "c d", "Oh, " + LONG)]
    found = benchmark(write, LONG)
    stream = RowStream([write(rows)])
    assert decontaminate(stream, found).num_overlapping == 2  # nothing is written without a name
    result = decontaminate(stream, found, output)
    assert read(output) == [rows[0], rows[2]]
    removed = read(output.replace(".jsonl", ".removed.jsonl"))
    assert [entry["record"] for entry in removed] == [rows[1], rows[3]]
    assert {entry["reason"] for entry in removed} == {"overlaps with a benchmark"}
    assert removed[0]["overlap"] == LONG
    assert result.num_rows == 4
    assert list(result.benchmark_rows.values()) == [2]
    with pytest.raises(DataError, match="exists already"):
        decontaminate(stream, found, output)


@needs_shared
def test_every_gsm8k_test_question_planted_in_the_training_file_is_found(write):
    """In other case and punctuation, in the middle of other text."""
    draw = random.Random(0)
    test = [row.text("question") for row in RowStream([SHARED / "gsm8k" / "test.jsonl"])]
    plants = [repunctuated(recased(text, draw), draw) for text in test]
    rows = [{"question": f"Solve this: {text} Think.", "answer": "#### 1"} for text in plants]
    found = Benchmark(RowStream([SHARED / "gsm8k" / "test.jsonl"]))
    result = decontaminate(RowStream([write(rows)]), found)
    assert result.num_overlapping == result.num_rows == len(test) == 1319


@needs_shared
def test_four_training_questions_of_gsm8k_share_thirteen_words_with_its_test_set():
    found = Benchmark(RowStream([SHARED / "gsm8k" / "test.jsonl"]))
    met = []
    stream = RowStream([SHARED / "gsm8k" / "train.jsonl"])
    result = decontaminate(stream, found, show=lambda row, _: met.append(row.number))
    assert result.num_rows == 7473
    assert met == [21, 407, 1315, 5163]
