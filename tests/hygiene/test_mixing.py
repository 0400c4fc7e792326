"""Mixtures: shares as asked for, every row accounted for, the same draws from the same seed."""

import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.hygiene.mix import Part, mix, tempered

from .conftest import read


@pytest.fixture
def sources(write):
    a = write([{"text": f"a{number}"} for number in range(300)], "a.jsonl")
    b = write([{"text": f"b{number}"} for number in range(100)], "b.jsonl")
    return a, b


def drawn(output, letter):
    return [row["text"] for row in read(output) if row["text"].startswith(letter)]


def test_temperature_makes_sizes_more_alike_by_hand():
    assert tempered([100, 400], 2) == [10, 20]
    assert tempered([100, 400], 1) == [100, 400]
    assert tempered([100, 400], 1e9) == pytest.approx([1, 1])


def test_stop_ends_with_the_first_source_and_keeps_the_weights(sources, output):
    """A source of 100 at one draw in four ends after about 400; weights 1 : 1 after about 200."""
    a, b = mix([Part(sources[0], 1), Part(sources[1], 1)], output, when_exhausted="stop")
    assert (b.num_written, b.num_rows, b.probability) == (100, 100, 0.5)
    assert 70 < a.num_written < 130
    assert a.num_rows == 300
    assert drawn(output, "a") == [f"a{number}" for number in range(a.num_written)]  # in order
    assert drawn(output, "b") == [f"b{number}" for number in range(100)]


def test_continue_writes_every_row_once(sources, output):
    parts = [Part(sources[0], 1), Part(sources[1], 5)]
    results = mix(parts, output, when_exhausted="continue")
    assert [part.num_written for part in results] == [300, 100]
    assert len(read(output)) == 400
    assert len({row["text"] for row in read(output)}) == 400


def test_repeat_begins_a_source_again_and_keeps_the_weights_to_the_end(sources, output):
    parts = [Part(sources[0], 1), Part(sources[1], 3)]
    results = mix(parts, output, when_exhausted="repeat", num_rows=2000)
    assert sum(part.num_written for part in results) == len(read(output)) == 2000
    assert results[1].num_written == pytest.approx(1500, abs=80)
    assert drawn(output, "b")[95:105] == [f"b{number % 100}" for number in range(95, 105)]


def test_the_seed_decides_the_draws(sources, tmp_path):
    parts = [Part(source, 1) for source in sources]
    rows = []
    for name, seed in (("x", 0), ("y", 0), ("z", 1)):
        mix(parts, str(tmp_path / f"{name}.jsonl"), when_exhausted="stop", seed=seed)
        rows.append(read(tmp_path / f"{name}.jsonl"))
    assert rows[0] == rows[1] != rows[2]


def test_rows_carry_their_source_unless_they_have_such_a_column(write, sources, output, tmp_path):
    mix([Part(source, 1) for source in sources], output, when_exhausted="stop", num_rows=50)
    assert {row["source"] for row in read(output)} == set(sources)
    own = [Part(write([{"text": "x", "source": "a book"}]), 1)]
    with pytest.raises(DataError, match="row 1: has a column 'source' already"):
        mix(own, str(tmp_path / "own.jsonl"), when_exhausted="stop")
    mix(own, str(tmp_path / "own.jsonl"), when_exhausted="stop", source_column="")
    assert read(tmp_path / "own.jsonl") == [{"text": "x", "source": "a book"}]


def test_repeating_without_an_end_is_refused(sources, output):
    with pytest.raises(ConfigError, match="num_rows: expected a number"):
        mix([Part(sources[0], 1)], output, when_exhausted="repeat")
