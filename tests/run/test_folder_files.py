"""Files and folders appear whole, together, or not at all."""

import json

import pytest

from posttrain.run.engine import atomic_folder
from posttrain.run.folder import whole_file, whole_files, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_when_the_block_ends(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_an_error_leaves_every_earlier_file_and_no_partial_one(tmp_path):
    (tmp_path / "a").write_text("old")

    def write_and_fail():
        with whole_files(tmp_path / "a", tmp_path / "b") as partials:
            for partial in partials:
                partial.write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_and_fail()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_files_of_one_block_appear_together(tmp_path):
    with whole_files(tmp_path / "a", tmp_path / "b") as partials:
        partials[0].write_text("1")
        partials[1].write_text("2")
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a", "b"]


def test_a_block_that_forgets_a_file_moves_none(tmp_path):
    with pytest.raises(FileNotFoundError), whole_files(tmp_path / "a", tmp_path / "b") as partials:
        partials[0].write_text("1")
    assert names(tmp_path) == []


def test_text_is_written_as_utf_8(tmp_path):
    write_whole(tmp_path / "a.json", json.dumps({"π": "é"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == {"π": "é"}


def test_an_atomic_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as partial:
        (partial / "weights").write_text("new")
        assert not target.exists()
    assert (target / "weights").read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_folder_that_was_there(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as partial:
        (partial / "weights").write_text("old")
    with pytest.raises(IsADirectoryError), atomic_folder(target) as partial:
        partial.write_text("a folder is no file")
    assert (target / "weights").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_save_left_does_not_get_into_the_next(tmp_path):
    stale = tmp_path / ".model.partial"
    stale.mkdir()
    (stale / "shard-of-another-model").write_text("x")
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "weights").write_text("new")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["weights"]
