"""Runs side by side."""

import pytest

from posttrain.cli import main
from posttrain.report.compare import compare, names_of
from posttrain.report.run import read_run
from tests.report.runs import rl_run, sample, sft_run


@pytest.fixture
def two(tmp_path):
    mine = [sample(5, 1, prompt="both?", text="mine"), sample(5, 1, prompt="only here?")]
    other = [sample(4, 0, prompt="both?", text="old"), sample(9, 0, prompt="both?", text="new")]
    first = rl_run(tmp_path / "a" / "run", samples=mine)
    second = rl_run(tmp_path / "b" / "run", steps=80, samples=other, config={"learning_rate": 3e-4})
    return first, second


def test_runs_of_one_name_are_told_apart(two):
    assert names_of(list(map(read_run, two))) == ["a/run", "b/run"]
    assert names_of([read_run(two[0])] * 2)[1].endswith("/a/run (2)")


def test_a_chart_has_a_line_for_each_run_that_logged_its_metric(two, tmp_path):
    sft = sft_run(tmp_path / "sft")
    charts = {c.key: c for c in compare(list(map(read_run, (*two, sft)))).charts}
    assert [s.label for s in charts["loss"].series] == ["a/run", "b/run", "sft"]
    assert [len(s.steps) for s in charts["loss"].series] == [40, 80, 4]
    assert [s.label for s in charts["format"].series] == ["a/run", "b/run"]


def test_only_settings_that_differ_are_listed(two):
    found = compare(list(map(read_run, two)))
    assert found.differences == [("learning_rate", ["0.0001", "0.0003"])]


def test_data_of_another_size_are_a_difference(tmp_path):
    rows = ({"train": 10}, {"train": 20, "held_out": 5})
    runs = [read_run(sft_run(tmp_path / str(i), rows=one)) for i, one in enumerate(rows)]
    assert compare(runs).differences == [
        ("rows, train", ["10", "20"]), ("rows, held_out", [None, "5"]),
    ]  # fmt: skip


def test_prompts_that_both_answered_stand_side_by_side_with_the_newest_sample(two):
    ((prompt, cells),) = compare(list(map(read_run, two))).prompts
    assert prompt == "both?"
    assert [(cell.step, cell.completion) for cell in cells] == [(5, "mine"), (9, "new")]
    assert [cell.reward for cell in cells] == [
        "reward 1.2, accuracy 1, format 1", "reward 0.2, accuracy 0, format 1",
    ]  # fmt: skip


def test_the_sides_of_a_held_out_pair_are_no_completions_of_the_model(tmp_path):
    """And where nothing is rewarded, no reward is said to be none."""
    kinds = ("held out", "chosen", "rejected")
    samples = [sample(5, 1, prompt="both?", text=kind, chosen=kind) for kind in kinds]
    runs = [read_run(sft_run(tmp_path / name, samples=samples)) for name in "ab"]
    ((_, cells),) = compare(runs).prompts
    assert [(cell.completion, cell.reward) for cell in cells] == [("held out", "")] * 2


def test_the_command_writes_one_page(two, tmp_path, capsys):
    path = tmp_path / "compare.html"
    main(["compare", *map(str, two), "--output", str(path)])
    text = path.read_text(encoding="utf-8")
    assert str(path) in capsys.readouterr().out
    assert "2 runs compared" in text
    assert text.count("<strong>+60 points</strong>") == 2
    assert "<td><code>0.0003</code></td>" in text


def test_one_run_is_too_few(two, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(two[0])])
    assert "expected two run folders or more, found 1" in capsys.readouterr().err
