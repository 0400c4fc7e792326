"""Mixtures and splits: every row accounted for, the same rows from the same seed, no leak."""

import random

import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.hygiene.duplicates import find_duplicates
from posttrain.hygiene.mix import Part, mix, split, tempered
from posttrain.hygiene.rows import RowStream, key_of

from .conftest import ROOT, read
from .plants import KINDS, planted

SEEDS = ROOT / "data" / "seed_tasks.jsonl"


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


def seed_rows():
    """Each seed, and four near-duplicates of it somewhere else in the file."""
    texts = [row.text("instruction") + " now, please" for row in RowStream([SEEDS])]
    rows = [{"prompt": text, "of": place} for place, text in enumerate(texts)]
    for kind in KINDS:
        rows += [{"prompt": t, "of": place} for place, t in enumerate(planted(texts, kind))]
    random.Random(0).shuffle(rows)
    return rows


def sides(path, folder, name="", **options):
    train, test = (str(folder / f"{side}{name}.jsonl") for side in ("train", "test"))
    options = {"test_fraction": 0.3, **options}
    result = split(RowStream([path]), train, test, **options)
    return read(train), read(test), result


def test_no_row_for_testing_is_like_one_for_training(write, tmp_path):
    rows = seed_rows()
    train, test, result = sides(write(rows), tmp_path)
    assert len(train) + len(test) == len(rows) == result.num_train + result.num_test
    assert [row for row in rows if row in test] == test  # in order
    assert 0.15 < len(test) / len(rows) < 0.45
    joined = write([*train, *test], "joined.jsonl")
    pairs = find_duplicates(map(key_of, RowStream([joined]))).pairs
    across = (pairs.earlier < len(train)) & (pairs.later >= len(train))
    assert len(pairs.later) > 300
    assert not across.any()


def test_rows_at_random_would_leak(write):
    """The control of the test above: the same rows cut in two without regard."""
    rows = seed_rows()
    pairs = find_duplicates(map(key_of, RowStream([write(rows)]))).pairs
    assert ((pairs.earlier < len(rows) // 2) & (pairs.later >= len(rows) // 2)).sum() > 100


def test_the_side_hangs_on_the_text_and_the_seed_not_on_the_order(write, tmp_path):
    rows = seed_rows()
    backwards = rows[::-1]
    _, test, _ = sides(write(rows), tmp_path)
    _, turned, _ = sides(write(backwards), tmp_path, "turned")
    _, other, _ = sides(write(rows), tmp_path, "other", seed=1)
    prompts = [{row["prompt"] for row in side} for side in (test, turned, other)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_an_empty_side_is_refused_with_the_clusters(write, tmp_path):
    path = write([{"prompt": "Name a tree!", "of": 0}, {"prompt": "name a tree", "of": 0}])
    with pytest.raises(DataError, match=r"2 rows form 1 clusters .* the largest of 2"):
        sides(path, tmp_path)
    assert not list(tmp_path.glob("t*.jsonl"))
