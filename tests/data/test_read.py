"""Reading files: every type gives the same rows, and every broken one says where and what."""

import csv
import gzip
import json
import re

import pytest

from posttrain.data import read_records
from posttrain.errors import DataError
from tests.cases import read_cases
from tests.data.conftest import data_error

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": 'a, "b"\nc', "answer": "ü"}]


def values(records):
    return [row.values for row in records]


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def write_csv(path):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


JSON_LINES = "\n".join(map(json.dumps, ROWS))
WRITERS = {
    "a.jsonl": lambda path: path.write_text(JSON_LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSON_LINES.encode())),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "wrapped.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "lines.json": lambda path: path.write_text(JSON_LINES),
    "a.csv": write_csv,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    records = read_records(tmp_path / name)
    assert values(records) == ROWS
    assert len(records) == 2
    assert records.columns == ["prompt", "answer"]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_text("text\none\n", encoding="utf-8-sig")
    assert values(read_records(tmp_path / "a.csv")) == [{"text": "one"}]


def test_lists_and_datasets_are_read_as_they_are():
    import datasets

    assert values(read_records(ROWS)) == ROWS
    assert values(read_records(datasets.Dataset.from_list(ROWS))) == ROWS


def test_row_numbers_of_jsonl_are_lines_so_that_an_editor_can_jump_there(write):
    path = write("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.where for row in read_records(path)] == [f"{path}, row 1", f"{path}, row 3"]


def test_columns_are_those_that_any_row_has(write):
    records = read_records(write("a.jsonl", [{"a": 1}, {"b": 2, "a": 3}]))
    assert records.columns == ["a", "b"]


def test_a_broken_file_is_an_error_that_says_where(write):
    wrong = []
    for case in read_cases(__file__, "broken_files"):
        error = data_error(read_records, write(case["name"], case["content"]))
        wrong += [(case, error)] * (not re.search(case["message"], error))
    assert wrong == []


def test_text_that_is_not_utf8_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        read_records(path)


def test_a_missing_file_names_the_nearest_one(write):
    path = write("pairs.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no such file .* Did you mean .*pairs\.jsonl"):
        read_records(path.with_name("pair.jsonl"))
    with pytest.raises(DataError, match=r"folder .* does not exist either"):
        read_records("no/such/folder/pairs.jsonl")


def test_rows_in_memory_must_be_dicts():
    with pytest.raises(DataError, match="row 2: expected a dict; found text"):
        read_records([{"a": 1}, "b"])


def test_a_folder_is_split_by_the_words_in_its_file_names(write, tmp_path):
    write("d/train-00000.jsonl", [{"text": "one"}])
    write("d/train-00001.jsonl", [{"text": "two"}])
    write("d/test.jsonl", [{"text": "held out"}])
    write("d/README.md", "not data")
    folder = tmp_path / "d"
    assert [row.values["text"] for row in read_records(folder)] == ["one", "two"]
    assert [row.values["text"] for row in read_records(folder, split="test")] == ["held out"]
    assert len(read_records(folder, split=None)) == 3
    with pytest.raises(DataError, match=r"no file for the split 'validation'; found: test\.jsonl"):
        read_records(folder, split="validation")


def test_files_that_name_no_split_are_for_training(write, tmp_path):
    write("d/latest.jsonl", [{"text": "one"}])  # holds the letters of "test", not the word
    write("d/x_test.jsonl", [{"text": "held out"}])
    assert [row.values["text"] for row in read_records(tmp_path / "d")] == ["one"]


def test_a_folder_without_data_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no data files"):
        read_records(tmp_path)


def test_a_hub_name_that_cannot_be_reached_is_one_readable_error(monkeypatch):
    import datasets

    def offline(name, config, split):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub ({config}, {split})")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"owner/name.*Couldn't reach .*main, test"):
        read_records("owner/name:main", split="test")


def test_a_hub_dataset_is_read_by_name(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    records = read_records("owner/name")
    assert values(records) == ROWS
    assert next(iter(records)).where == "owner/name, row 1"


def test_rows_are_read_anew_each_time_and_a_file_that_grew_is_an_error(write):
    path = write("a.jsonl", [{"a": 1}, {"a": 2}])
    records = read_records(path)
    assert values(records) == values(records) == [{"a": 1}, {"a": 2}]
    with path.open("a") as file:
        file.write('{"a": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read\. Start again"):
        values(records)
