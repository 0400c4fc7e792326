"""Splits: near-duplicates on one side, whatever the order, and no row lost."""

import random

import pytest

from posttrain.errors import DataError
from posttrain.hygiene.duplicates import find_duplicates
from posttrain.hygiene.mix import split
from posttrain.hygiene.rows import RowStream, key_of

from .conftest import ROOT, read
from .plants import KINDS, planted

SEEDS = ROOT / "data" / "seed_tasks.jsonl"


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
