"""The `posttrain` command: verdicts with their reasons, errors for whoever typed it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]

COMPLETION = "<think>9 + 9</think><answer>18</answer>"


def run(*argv):
    main(list(argv))


@pytest.mark.parametrize(
    ("gold", "answer", "score", "reason"),
    [
        ("1/2", "0.5", "1", "equal numbers"),
        ("1/2", r"so it is \boxed{\frac12}", "1", "equal numbers"),
        ("18.0", COMPLETION, "1", "equal numbers"),
        ("18", "17", "0", "different numbers"),
        ("18", "<think>18", "0", "no answer: <think> is not closed"),
        ("", "17", "None", "gold cannot be read"),
    ],
)
def test_a_verdict_comes_with_the_rule_that_decided(gold, answer, score, reason, capsys):
    run("verify", f"--gold={gold}", "--answer", answer)
    printed = capsys.readouterr().out
    assert printed.split("  ", 1)[0] == score
    assert reason in printed


def test_options_reach_the_verifier(capsys):
    run("verify", "--gold", "18", "--answer", "makes 18.0 in all", "--allow_last_number")
    assert capsys.readouterr().out.startswith("1  equal numbers")


def test_a_file_is_judged_row_by_row_and_counted(tmp_path, capsys):
    rows = [
        {"gold": "18", "answer": "18.0"},
        {"gold": "18", "completion": "18"},  # what a model wrote, with no answer marked
        {"answer": "18.0", "completion": COMPLETION},
        {"gold": "18", "answer": "17"},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    run("verify", str(path))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split("  ")[0] for line in lines[:4]] == ["1", "0", "1", "0"]
    assert "row 4: 0  different numbers  (gold '18'" in lines[3]
    assert "4 answers" in lines
    assert any(line.split() == ["2", "1", "equal", "numbers"] for line in lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["verfy"], "Did you mean 'verify'?"),
        (["verify"], "expected a FILE, or --gold and --answer"),
        (["verify", "--gold", "1"], "expected a FILE, or --gold and --answer"),
        (["verify", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as left:
        run(*argv)
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert message in printed.err
    assert printed.out == ""


def test_rows_without_the_columns_are_named(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"gold": "1", "anwser": "1"}\n')
    with pytest.raises(SystemExit):
        run("verify", str(path))
    assert "row 1: expected gold and answer" in capsys.readouterr().err


def test_a_data_command_runs_on_files_before_its_flags(tmp_path, capsys):
    rows = [{"question": f"How much is {n} and {n}?", "answer": str(2 * n)} for n in (1, 2, 1)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    run("data", "dedup", str(path), "--output", str(tmp_path / "unique.jsonl"))
    assert "3 rows: 2 kept" in capsys.readouterr().out
    assert len((tmp_path / "unique.jsonl").read_text().splitlines()) == 2
    with pytest.raises(SystemExit) as left:
        run("data", "dedup", str(path), "--output", str(tmp_path / "unique.jsonl"))
    assert left.value.code == 2


def test_the_data_commands_are_listed_and_misspelt_ones_named(capsys):
    run("data", "--help")
    listed = capsys.readouterr().out
    assert "dedup" in listed
    assert "decontaminate" in listed
    with pytest.raises(SystemExit):
        run("data", "dedupe", "x.jsonl")
    assert "Did you mean 'dedup'?" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(argv):
    program = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'}\n"
        "atexit.register(lambda: print('HEAVY', *sorted(heavy & set(sys.modules))))\n"
        "from posttrain.cli import main\n"
        f"main({argv!r})"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "HEAVY"


def test_every_command_is_listed_with_what_it_does(capsys):
    run("--help")
    listed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name:12}{command.__doc__}" in listed
