"""What the loader says, and to whom."""

from posttrain.data import load_documents, load_pairs, load_prompts
from posttrain.data.load import marked_example
from posttrain.data.loading import quantiles

ROW = {"instruction": "Add.", "output": "3 [b]"}


def test_one_line_says_what_was_found_and_one_shows_the_targets(tokenizer, write, quiet):
    path = write("a.jsonl", [ROW, ROW])
    load_documents(path, tokenizer, say=quiet)
    summary, example = quiet.lines
    length = (
        len(
            "Below is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:"
            "3 [b]"
        )
        + 1
    )
    assert summary == (
        f"{path}: 2 rows of Alpaca (instruction, output), template alpaca -> 2 documents; "
        f"tokens p50 {length}, p95 {length}, max {length}; 0.0% truncated"
    )
    assert example.startswith("first example (trained between « »): Below is")
    assert example.endswith("### Instruction:↵Add.↵↵### Response:«3 [b]</s>»")


def test_pairs_show_both_answers_and_prompts_the_reference_answer(tokenizer, quiet):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    load_pairs([pair], tokenizer, template="plain", say=quiet)
    assert quiet.lines[-1].endswith("q«a</s>» | rejected: «b</s>»")
    load_prompts([{"question": "q", "answer": "7"}], tokenizer, template="plain", say=quiet)
    assert quiet.lines[-1] == "first example: q | answer: 7"


def test_only_the_main_process_speaks(tokenizer, quiet, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    load_documents([ROW], tokenizer)
    load_documents([ROW], tokenizer, say=quiet)
    assert (quiet.lines, capsys.readouterr().out) == ([], "")
    monkeypatch.setenv("RANK", "0")
    load_documents([ROW], tokenizer)
    assert capsys.readouterr().out.startswith("rows in memory: 1 rows of Alpaca")


def test_on_a_terminal_brackets_in_the_data_are_not_markup(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    load_documents([ROW], tokenizer)
    shown = capsys.readouterr().out.replace("\n", "")
    assert "3 [b]</s>" in shown
    assert "«" not in shown  # the colour marks the targets


def test_long_runs_are_cut_in_the_middle_and_many_runs_counted():
    shown = marked_example([("a" * 1000 + "\n", False), ("b", True)] + [("c", True)] * 10)
    assert len(shown) < 400
    assert "a … a" in shown
    assert "↵«b»" in shown
    assert shown.endswith("and 4 more pieces")


def test_quantiles_by_hand():
    """Nearest rank of 1..20: the 10th and the 19th."""
    assert quantiles(range(20, 0, -1)) == (10, 19, 20)
    assert quantiles([5]) == (5, 5, 5)
