"""The check sees what would break training, and says nothing of files that are fine."""

import pytest

from posttrain.hygiene.check import check, languages_of
from posttrain.hygiene.report import lines_of
from posttrain.hygiene.rows import RowStream

from .conftest import ROOT, read


def alpaca(count=200, **changes):
    return [
        {"instruction": f"Name the tree of number {n}.", "input": "", "output": f"Tree {n}"}
        | changes
        for n in range(count)
    ]


def report_on(write, rows, **options):
    return check(RowStream([write(rows)]), **options)


@pytest.mark.parametrize("name", ["sft", "preferences", "problems"])
def test_the_shipped_files_break_nothing(write, tokenizer, name):
    """Every fifth row: one writer made them all."""
    rows = read(ROOT / "data" / f"{name}.jsonl")[::5]
    report = report_on(write, rows, tokenizer=tokenizer, near=False)  # near ones break nothing
    assert report.breaks == []
    assert report.tokens.num_examples == report.num_rows == len(rows)


def test_counts_are_those_of_the_file(write):
    rows = alpaca(98) + alpaca(1, output=" ") + alpaca(1, input="oak", licence="MIT")
    report = report_on(write, [*rows, rows[3]])
    assert report.num_rows == 101
    assert report.formats == {"Alpaca": 101}
    assert report.columns == {"instruction": 101, "input": 101, "output": 101, "licence": 1}
    assert report.licences == {"licence": {"MIT": 1}}
    assert {reason: places.count for reason, places in report.dropped.items()} == {
        "with an empty answer": 1
    }
    # Exact: row 1 with another answer, row 4 again. Near: row 1 with an input.
    assert (report.num_exact, report.num_near) == (2, 1)
    assert report.prompt_chars[2] == len("Name the tree of number 0.oak")
    assert report.breaks == []


def test_rows_that_cannot_be_read_and_other_formats_break_training(write):
    report = report_on(write, [*alpaca(3), {"instruction": "a", "output": 3}, {"text": "b"}])
    unreadable, formats = report.breaks
    assert "1 rows cannot be read" in unreadable
    assert "row 4: 'output' is a number (3)" in unreadable
    assert "4 Alpaca, 1 text" in formats


def test_a_row_without_a_format_is_counted_and_does_not_end_the_check(write):
    report = report_on(write, [{"foo": 1}, *alpaca(5)])
    assert report.unreadable.count == 1
    assert "row 1: filled columns foo make no known format" in report.breaks[0]
    assert report.formats == {"Alpaca": 5}


def test_many_empty_answers_break_training_and_a_few_do_not(write):
    assert report_on(write, alpaca(199) + alpaca(1, output="")).breaks == []
    (sentence,) = report_on(write, alpaca(95) + alpaca(5, output="")).breaks
    assert "5 rows come with an empty answer, more than 1%" in sentence


def test_rows_that_are_all_left_out_break_training(write):
    rows = [{"chosen": "\n\nHuman: a", "rejected": "\n\nAssistant: b"}] * 3
    assert report_on(write, rows).breaks == ["No row can be trained on."]


def test_what_the_loaders_leave_out_is_counted_by_their_reasons(write, tokenizer):
    asked = {"messages": [{"role": "user", "content": "Hello?"}]}
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    report = report_on(write, [asked, {"messages": turns}], tokenizer=tokenizer)
    assert {reason: places.count for reason, places in report.dropped.items()} == {
        "without an assistant turn": 1
    }
    pair = {"prompt": "a", "chosen": "b", "rejected": "b"}
    assert list(report_on(write, [pair]).dropped) == ["whose chosen equals rejected"]


def test_the_mask_covers_the_answer_and_its_end(write, tokenizer):
    """Each answer `5` is one token and an end token, after a prompt that is not trained."""
    rows = alpaca(50, output="5")
    tokens = report_on(write, rows, tokenizer=tokenizer).tokens
    assert tokens.template == "alpaca"
    assert tokens.num_trained == 2 * 50
    assert (tokens.num_untrained, tokens.num_unended) == (0, 0)


def test_answers_cut_before_their_end_would_never_teach_to_stop(write, tokenizer):
    rows = alpaca(20, output="7" * 300)
    report = report_on(write, rows, tokenizer=tokenizer, max_length=200)
    assert report.tokens.num_too_long == 20
    assert any("could not learn to stop" in sentence for sentence in report.breaks)
    short = report_on(write, rows, tokenizer=tokenizer, max_length=8)
    assert any("mask covers no token" in sentence for sentence in short.breaks)


def test_what_a_template_cannot_render_breaks_training_by_its_row(write, tokenizer):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    rows = [{"messages": turns[:2]}, {"messages": turns}]
    report = report_on(write, rows, tokenizer=tokenizer, template="alpaca")
    (sentence,) = report.breaks
    assert sentence.startswith("1 rows cannot be rendered")
    assert "row 2: the prompt is a conversation" in sentence


def test_a_chat_template_is_checked_as_it_trains(write, chat_tokenizer):
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    tokens = report_on(write, [{"messages": turns}] * 10, tokenizer=chat_tokenizer).tokens
    assert (tokens.template, tokens.num_unended) == ("chat", 0)
    assert tokens.num_trained == 2 * 10


def test_rows_that_do_not_give_what_is_asked_for_break_training(write):
    report = report_on(write, alpaca(3), need="pairs")
    assert "gives documents or prompts, not pairs" in report.breaks[0]


def test_languages_are_told_apart():
    german = "Der schnelle braune Fuchs springt über den faulen Hund und freut sich."
    english = "The weather in the north of the country will be cold tomorrow morning."
    assert languages_of([english, english, german, german, german, " "]) == {"de": 0.6, "en": 0.4}


def test_without_a_tokenizer_the_report_says_what_was_not_checked(write, tokenizer):
    without = dict(lines_of(report_on(write, alpaca(3))))
    assert without["template, mask, tokens"].startswith("not checked")
    lines = dict(lines_of(report_on(write, alpaca(3), tokenizer=tokenizer, near=False)))
    assert lines["template"] == "alpaca; 0 rows refused"
    assert "near ones not looked for" in lines["duplicates"]
    assert lines["licence"] == "no column license, licence or source"


def test_unused_columns_and_control_tokens_are_named(write, tokenizer):
    end = tokenizer.eos_token
    rows = alpaca(3, source="web") + alpaca(1, output=f"Tree {end} 3")
    report = report_on(write, rows, tokenizer=tokenizer)
    assert report.unused == ["source"]
    assert report.tokens.control.count == 1
    assert report.tokens.control.first.endswith("row 4")
    lines = dict(lines_of(report))
    assert lines["columns not used"] == "source"
    assert lines["control tokens in the text"].startswith("1 rows (first: ")
