"""Duplicates: those planted are found, others stay, and every row is in one of the two files."""

import json
import tracemalloc

import pytest

from posttrain.errors import DataError
from posttrain.hygiene.duplicates import deduplicate
from posttrain.hygiene.rows import RowStream, key_of

from .conftest import ROOT, SHARED, needs_shared, read
from .plants import KINDS, planted

SEEDS = ROOT / "data" / "seed_tasks.jsonl"


def dedup(path, output, **options):
    return deduplicate(RowStream([path]), output, **options)


def questions(*texts):
    return [{"question": text, "answer": str(place)} for place, text in enumerate(texts)]


def kept_answers(output):
    return [row["answer"] for row in read(output)]


def beside(output, what):
    return read(output.replace(".jsonl", f".{what}.jsonl"))


APPLES = "Tom has 3 red apples and eats them all before noon. How many are left?"


def test_other_dress_is_a_duplicate_and_other_numbers_are_not(write, output):
    texts = [
        APPLES,
        APPLES.upper() + "!!",
        APPLES.replace("red apples", "apples red"),
        APPLES.replace("noon", "night"),
        APPLES.replace("3", "4"),
        "Who wrote Faust?",
    ]
    result = dedup(write(questions(*texts)), output)
    assert kept_answers(output) == ["0", "4", "5"]
    assert (result.num_rows, result.num_kept, result.num_exact, result.num_near) == (6, 3, 0, 3)


def test_every_row_is_in_one_of_the_two_files_in_order(write, output):
    rows = questions(*[APPLES, "a b c", APPLES, "Name a tree.", "A, B: c?", APPLES + " Say it."])
    dedup(write(rows), output)
    removed = beside(output, "removed")
    assert kept_answers(output) == ["0", "1", "3"]
    assert [entry["record"] for entry in removed] == [rows[2], rows[4], rows[5]]
    assert [(entry["row"], entry["kept_row"]) for entry in removed] == [(3, 1), (5, 2), (6, 1)]
    reasons = ["exact duplicate", "near duplicate", "near duplicate"]
    assert [entry["reason"] for entry in removed] == reasons
    assert [entry["similarity"] for entry in removed][:2] == [1, 1]
    assert 0.6 <= removed[2]["similarity"] < 1


def test_clusters_name_the_row_that_stays_and_those_that_went(write, output):
    dedup(write(questions("a b c", "x y z", "X, y z", "A b c", "a: b: c")), output)
    clusters = beside(output, "clusters")
    places = [(c["kept"]["row"], [row["row"] for row in c["removed"]]) for c in clusters]
    assert places == [(1, [4, 5]), (2, [3])]
    assert [row["cluster"] for row in beside(output, "removed")] == [2, 1, 1]


def test_without_near_only_texts_equal_to_the_letter_go(write, output):
    result = dedup(write(questions(APPLES, APPLES + " ", APPLES)), output, near=False)
    assert kept_answers(output) == ["0", "1"]
    assert (result.num_exact, result.num_near) == (1, 0)


def test_a_chain_of_small_changes_does_not_make_its_ends_the_same(write, output):
    """Each of the ten steps exchanges one more word of ten."""
    words = [f"word{letter}" for letter in "abcdefghij"]
    steps = [[f"new{letter}" for letter in "abcdefghij"][:n] + words[n:] for n in range(11)]
    dedup(write(questions(*map(" ".join, steps))), output)
    kept = [int(answer) for answer in kept_answers(output)]
    assert kept[0] == 0
    assert kept[-1] >= 9
    assert len(kept) < 11
    for entry in beside(output, "removed"):
        assert abs(entry["row"] - entry["kept_row"]) <= 2  # directly like the row that stays


def test_of_two_rows_that_stay_the_nearer_one_is_named(write, output):
    """Of 39 members the first shares 31, the second 35: 31 / 47 and 35 / 43 (27 / 51 together)."""
    words = [f"word{letter}" for letter in "abcdefghijklmnopqrst"]
    first, second = [*words[:16], "u", "v", "w", "x"], ["y", "z", *words[2:]]
    dedup(write(questions(*map(" ".join, (first, second, words)))), output)
    (removed,) = beside(output, "removed")
    assert kept_answers(output) == ["0", "1"]
    assert removed["kept_row"] == 2
    assert removed["similarity"] == round(35 / 43, 3)


def test_texts_without_words_repeat_only_themselves(write, output):
    dedup(write(questions("?!", "...", "?!")), output)
    assert kept_answers(output) == ["0", "1"]


@pytest.mark.parametrize("change", [1, -1])
def test_a_file_that_changes_while_it_is_read_is_an_error(write, output, change):
    """It has three rows in the first pass, and one more or less in the second."""

    class Changing(RowStream):
        num_rows = 3

        def __iter__(self):
            yield from list(super().__iter__())[: self.num_rows]
            self.num_rows += change

    with pytest.raises(DataError, match="changed while it was read"):
        deduplicate(Changing([write(questions("a", "b", "c", "d"))]), output)


def test_the_prompt_side_is_compared_unless_columns_are_named(write, output, tmp_path):
    rows = [{"prompt": "Say hello.", "completion": text} for text in ("Hello.", "Good morning!")]
    assert dedup(write(rows), output).num_kept == 1
    columns = ["prompt", "completion"]
    named = dedup(write(rows), str(tmp_path / "named.jsonl"), columns=columns)
    assert named.num_kept == 2
    with pytest.raises(DataError, match=r"row 1: none of the columns promt is filled; found"):
        dedup(write(rows), str(tmp_path / "wrong.jsonl"), columns=["promt"])


def test_a_long_system_turn_neither_joins_nor_is_lost(write, output):
    """The same one does not make two questions alike; another one makes one question two."""
    system = " ".join(f"rule{number}" for number in range(200))

    def row(rules, question):
        turns = [("system", rules), ("user", question), ("assistant", "Yes.")]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    rows = [row(system, "Is it raining?"), row(system, "May I go?"), row("Be kind.", "May I go?")]
    assert dedup(write(rows), output).num_kept == 3


def test_the_same_rows_are_removed_in_every_run(write, tmp_path):
    path = write(questions(*[f"Count the {i % 5} stones in row {i % 7}." for i in range(200)]))
    outputs = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    results = [dedup(path, output) for output in outputs]
    assert results[0] == results[1]
    assert results[0].num_kept == 35
    for what in ("", ".removed", ".clusters"):
        one, other = (output.replace(".jsonl", f"{what}.jsonl") for output in outputs)
        assert read(one) == read(other)


def test_nothing_is_overwritten_and_an_error_leaves_nothing(write, output, tmp_path):
    path = write(questions("a", "b"))
    dedup(path, output)
    before = read(output)
    with pytest.raises(DataError, match=r"out\.jsonl: exists already"):
        dedup(path, output)
    assert read(output) == before
    with pytest.raises(DataError, match="exists already"):  # before hours of reading
        dedup(write([{"foo": 1}], "other.jsonl"), output)
    broken = write([*questions("a"), {"question": 3, "answer": "b"}], "broken.jsonl")
    with pytest.raises(DataError, match=r"row 2: 'question' is a number"):
        dedup(broken, str(tmp_path / "new.jsonl"))
    assert not list(tmp_path.glob("*new*"))


def recall_and_false_removals(texts, write, output):
    """Of each kind of plant the share found; and the share of originals that go."""
    originals = [{"prompt": text, "n": place} for place, text in enumerate(texts)]
    shares = {}
    for kind in KINDS:
        plants = [{"prompt": t, "n": i} for i, t in enumerate(planted(texts, kind))]
        new = output.replace(".jsonl", f"_{kind.split()[0]}.jsonl")
        dedup(write([*originals, *plants]), new)
        of_plants = [e for e in beside(new, "removed") if e["row"] > len(texts)]
        shares[kind] = sum(e["kept_row"] == e["record"]["n"] + 1 for e in of_plants) / len(texts)
    dedup(write(originals), output)
    return shares, len(beside(output, "removed")) / len(texts)


def check_goals(texts, write, output):
    shares, false_removals = recall_and_false_removals(texts, write, output)
    assert min(shares.values()) >= 0.95, shares
    assert false_removals < 0.01


def test_95_percent_of_planted_ones_are_found_among_the_shipped_seeds(write, output):
    check_goals([key_of(row).text for row in RowStream([SEEDS])], write, output)


@needs_shared
def test_95_percent_of_planted_ones_are_found_among_real_seeds_and_problems(write, output):
    """Seeds with their inputs, and every sixteenth question of GSM8K; under 1 % of them go."""
    seeds = RowStream([SHARED / "self_instruct" / "seed_tasks.jsonl"])
    problems = RowStream([SHARED / "gsm8k" / "train.jsonl"])
    check_goals([key_of(row).text for row in seeds], write, output)
    questions = [row.text("question") for row in problems][::16]
    check_goals(questions, write, output.replace(".jsonl", "_gsm8k.jsonl"))


@needs_shared
def test_of_all_of_gsm8k_one_question_goes(output):
    """Two differ in a name alone; dozens differ in numbers, and stay."""
    files = [SHARED / "gsm8k" / f"{split}.jsonl" for split in ("train", "test")]
    result = deduplicate(RowStream(files), output)
    assert (result.num_rows, result.num_kept) == (8792, 8791)


def test_memory_does_not_grow_with_the_file(tmp_path, output):
    """40 MB of rows in less than 8 MB."""
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        for number in range(500):
            row = {"question": f"Which {number} is it?", "answer": "x" * 80_000}
            file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    try:
        result = dedup(str(path), output)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.num_kept == 500
    assert peak < 8e6 <= path.stat().st_size / 5
