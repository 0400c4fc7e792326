"""Files are whole or absent, and what JSON holds comes back as it was."""

import pytest

from posttrain.errors import DataError
from posttrain.hygiene.outputs import new_files
from posttrain.hygiene.rows import RowStream

from .conftest import read


def test_files_appear_together_and_only_when_all_is_written(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with new_files(*paths) as (a, b):
        a.write({"n": 1}, "here")
        assert not paths[0].exists()
        b.write({"n": "ü"}, "here")
    assert [read(path) for path in paths] == [[{"n": 1}], [{"n": "ü"}]]
    assert sorted(tmp_path.iterdir()) == paths


def test_an_error_leaves_no_file_at_all(tmp_path):
    def write_and_fail():
        with new_files(tmp_path / "a.jsonl") as (a,):
            a.write({"n": 1}, "here")
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    assert not list(tmp_path.iterdir())


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "a.jsonl"

    def write_while_another_does():
        with new_files(path) as (a,):
            a.write({"n": 1}, "here")
            path.write_text("another's")

    with pytest.raises(DataError, match="exists already"):
        write_while_another_does()
    assert path.read_text() == "another's"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.json"], r"a\.json: expected a name that ends in \.jsonl"),
        (["no/a.jsonl"], "the folder .*no does not exist"),
        (["a.jsonl", "a.jsonl"], "two outputs of one name"),
    ],
)
def test_a_name_that_cannot_be_written_is_an_error(tmp_path, names, message):
    with pytest.raises(DataError, match=message), new_files(*[tmp_path / n for n in names]):
        pass


def test_half_a_surrogate_pair_is_written_as_it_came(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "half \\ud83d"}\n')
    (row,) = RowStream([path])
    with new_files(tmp_path / "out.jsonl") as (file,):
        file.write(row.values, row.where)
    assert read(tmp_path / "out.jsonl") == [{"text": "half \ud83d"}]


def test_a_value_without_a_form_in_json_is_an_error_that_says_where(tmp_path):
    with (
        pytest.raises(DataError, match="x, row 3: a value that JSON cannot hold"),
        new_files(tmp_path / "a.jsonl") as (file,),
    ):
        file.write({"when": object()}, "x, row 3")
