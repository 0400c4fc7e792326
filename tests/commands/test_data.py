"""`posttrain data`: flags in, files and words out, and a fast start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from posttrain.commands import data as commands
from posttrain.commands.data import COMMANDS
from posttrain.errors import ConfigError
from posttrain.run.options import load, parse

ROOT = Path(__file__).parents[2]


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def run(command, *flags):
    config_class, main = COMMANDS[command]
    return main(load(config_class, [str(flag) for flag in flags]))


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines, returns the file's name."""

    def write_file(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out.jsonl")


@pytest.fixture
def rows(write):
    """Ten questions; the last repeats the first."""
    texts = [f"Name the {n} largest towns of the country and their rivers." for n in range(9)]
    return write([{"question": text, "answer": "x"} for text in [*texts, texts[0].upper()]])


def test_dedup_says_what_it_kept_and_removed(rows, output, capsys):
    run("dedup", "--dataset", rows, "--output", output)
    assert len(read(output)) == 9
    said = capsys.readouterr().out
    assert "10 rows: 9 kept" in said
    assert "0 exact and 1 near duplicates removed (1 clusters)" in said


def test_check_ends_with_status_one_when_training_would_break(rows, write, capsys):
    assert run("check", "--dataset", rows).num_near == 1
    assert "Nothing found that would break training" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run("check", "--dataset", write([{"foo": 1}], "broken.jsonl"))
    assert ended.value.code == 1
    assert "This would break training: 1 rows cannot be read" in capsys.readouterr().out


def test_check_with_the_shipped_tokenizer_looks_at_the_mask(rows, capsys):
    run("check", "--dataset", rows, "--tokenizer", ROOT / "data" / "tiny_tokenizer")
    assert "0 rows refused" in capsys.readouterr().out


def test_decontaminate_shows_overlaps_and_removes_on_request_alone(rows, write, output, capsys):
    benchmark = write(read(rows)[:2], "benchmark.jsonl")
    flags = ["--dataset", rows, "--against", benchmark]
    assert run("decontaminate", *flags, "--num_words", 5).num_overlapping == 10
    said = capsys.readouterr().out
    assert "row 3 <-" in said
    assert "largest towns of the country" in said
    assert "10 of 10 rows overlap with 2 of 2 benchmark rows; none removed" in said
    # Ten words are fewer than 13: whole texts alone count, the first twice.
    assert run("decontaminate", *flags, "--remove", "--output", output).num_overlapping == 3
    assert len(read(output)) == 7
    with pytest.raises(ConfigError, match="output: expected a file"):
        run("decontaminate", *flags, "--remove")
    with pytest.raises(ConfigError, match="output: expected none without --remove"):
        run("decontaminate", *flags, "--output", output)


def test_mix_says_what_each_source_gave(rows, output, capsys):
    flags = ["--when_exhausted", "repeat", "--num_rows", 30, "--output", output]
    run("mix", "--dataset", rows, rows, "--weights", 1, 2, *flags)
    assert len(read(output)) == 30
    assert "of 10 there" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="weights: expected one for each of 1 files, found 2"):
        run("mix", "--dataset", rows, "--weights", 1, 2, *flags)
    with pytest.raises(ConfigError, match="num_rows: expected a number"):
        run("mix", "--dataset", rows, "--when_exhausted", "repeat", "--output", output)


def test_split_writes_both_sides(rows, tmp_path, capsys):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    flags = ["--train_output", train, "--test_output", test, "--test_fraction", 0.5]
    run("split", "--dataset", rows, *flags)
    assert len(read(train)) + len(read(test)) == 10
    assert "9 clusters, the largest of 2 rows" in capsys.readouterr().out


def test_show_prints_the_row_with_its_trained_tokens(rows, capsys):
    run("show", "--dataset", rows, "--tokenizer", ROOT / "data" / "tiny_tokenizer", "--row", 2)
    shown = capsys.readouterr().out
    assert "Name the 1 largest" in shown
    assert "«x<|endoftext|>»" in shown


def test_convert_writes_the_other_format(rows, output, capsys):
    run("convert", "--dataset", rows, "--to", "messages", "--output", output)
    assert read(output)[0]["messages"][1] == {"role": "assistant", "content": "x"}
    assert "10 rows read, 10 written" in capsys.readouterr().out


def test_the_settings_know_what_the_library_knows():
    from posttrain.data.formats import NEEDS
    from posttrain.hygiene import contamination, duplicates
    from posttrain.hygiene.convert import WRITERS

    assert get_args(get_type_hints(commands.ConvertConfig)["to"]) == tuple(WRITERS)
    assert commands.DedupConfig(dataset=[], output="").threshold == duplicates.THRESHOLD
    found = commands.DecontaminateConfig(dataset=[], against=[]).num_words
    assert found == contamination.NUM_WORDS
    choice, _ = get_args(get_type_hints(commands.ShowConfig)["load_as"])
    needs = [commands._need(load_as) for load_as in get_args(choice)]
    assert sorted(needs) == sorted(NEEDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(COMMANDS[command][0], ["--help"])
    assert ended.value.code == 0
    assert "--dataset" in capsys.readouterr().out


def test_the_commands_load_nothing_heavy():
    program = "import sys, posttrain.commands.data; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "datasets", "numpy"} & set(loaded)
