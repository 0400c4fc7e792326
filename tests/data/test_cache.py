"""What is kept on disk gives the same examples and the same report, or is made again."""

import errno
import gc
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest

from posttrain.data import (
    cache,
    load_documents,
    load_pairs,
    load_prompts,
    load_steps,
    load_unpaired,
    loading,
)
from posttrain.data.loading import Loader
from posttrain.errors import ConfigError, DataError
from tests.data.conftest import CHATML

ROWS = 1100  # more than a batch
LONG = "long " * 30
DATA = {
    load_documents: [
        {"prompt": f"q{i} ", "completion": LONG if i == 7 else "" if i == 9 else f"a </s> {i}"}
        for i in range(ROWS)
    ],
    load_pairs: [
        {"prompt": f"q{i}", "chosen": "a", "rejected": LONG if i == 7 else "b", "margin": i % 3}
        for i in range(ROWS)
    ],
    load_prompts: [
        {"question": LONG if i == 7 else f"q{i}", "answer": f"#### {i}", "source": [i]}
        for i in range(ROWS)
    ],
    load_unpaired: [{"prompt": f"q{i}", "completion": "a", "label": i > 9} for i in range(ROWS)],
    load_steps: [
        {"prompt": f"q{i}", "completions": ["a", LONG if i == 7 else "b"], "labels": [True, False]}
        for i in range(ROWS)
    ],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which entries are kept, however small the data."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(loading, "MIN_KEPT_BYTES", 0)
    return tmp_path / "cache" / "posttrain"


@pytest.fixture
def load(write, tokenizer, folder):  # noqa: ARG001  (where it is kept)
    """Load documents of a file of a few rows, with settings that a test changes."""
    path = write("rows.jsonl", DATA[load_documents][:200])

    def load_it(**settings):
        lines = []
        own = {"template": "plain", "max_length": 60, "truncation": "drop", "say": lines.append}
        given = {"tokenizer": tokenizer, **own, **settings}
        return load_documents(path, given.pop("tokenizer"), **given), lines

    load_it.path = path
    return load_it


def entries(folder):
    return [entry.name for entry in folder.glob("*") if entry.is_dir()] if folder.exists() else []


def forbid_making(monkeypatch):
    def made_again(_self):
        raise AssertionError("made again")

    monkeypatch.setattr(Loader, "_blocks", made_again)


@pytest.mark.parametrize("loader", DATA, ids=lambda loader: loader.__name__)
def test_kept_examples_and_their_report_are_those_that_were_made(
    loader, tokenizer, write, folder, monkeypatch
):
    path, reports = write("rows.jsonl", DATA[loader]), []
    limit = {"max_prompt_length" if loader is load_prompts else "max_length": 60}

    def load_it():
        lines = []
        found = loader(path, tokenizer, template="plain", say=lines.append, **limit)
        reports.append(lines)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(loading, "MIN_KEPT_BYTES", 2**40)
        plain = load_it()
    assert not folder.exists()
    made = load_it()
    forbid_making(monkeypatch)
    kept = load_it()
    assert reports[0] == reports[1] == reports[2]
    for found in (made, kept):
        assert found.features == plain.features
        assert found.to_list() == plain.to_list()
    assert loader is load_unpaired or "(first: row" in reports[2][0]


def test_kept_examples_are_mapped_into_memory_and_named_by_their_content(load, folder):
    load()
    kept, _ = load()
    assert [file["filename"] for file in kept.cache_files] == [
        str(folder / entries(folder)[0] / cache.EXAMPLES)
    ]
    assert load()[0]._fingerprint == kept._fingerprint


def test_dropped_and_noted_rows_are_named_again(load):
    first, again = load()[1], load()[1]
    assert "1 longer than 60 tokens (first: row 8)" in again[0]
    assert "1 with an empty answer (first: row 10)" in again[0]
    assert "198 with control tokens spelled out in their text" in again[0]
    assert first == again


def other_tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["q1"])
    return tokenizer


CHANGES = {
    "template": lambda _: {"template": "alpaca"},
    "max_length": lambda _: {"max_length": 59},
    "truncation": lambda _: {"truncation": "keep_end"},
    "vocabulary": lambda make: {"tokenizer": other_tokenizer(make)},
    "end token": lambda make: {"tokenizer": make(eos="<|im_end|>")},
    "chat template": lambda make: {"tokenizer": make(chat_template=CHATML)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_or_tokenizer_has_another_entry(change, load, folder, make_tokenizer):
    common = {"max_length": 400} if change == "template" else {}
    load(**common)
    load(**common, **CHANGES[change](make_tokenizer))
    assert len(entries(folder)) == 2


def test_other_content_has_another_entry_under_the_same_size_and_time(load, folder):
    before = load()[0][0]["input_ids"]
    times = load.path.stat()
    load.path.write_text(load.path.read_text().replace("q0", "Q0"))
    os.utime(load.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load()[0][0]["input_ids"] != before
    assert len(entries(folder)) == 2


def test_other_code_has_another_entry(load, folder, monkeypatch, tmp_path):
    load()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "cache.py").write_text("other = 1")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "code" / "cache.py"))
    load()
    assert len(entries(folder)) == 2


def cut_short(entry):
    path = entry / cache.EXAMPLES
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(entry):
    path = entry / cache.EXAMPLES
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_the_report(entry):
    path = entry / cache.ABOUT
    path.write_text(path.read_text().replace("198", "197"))


DAMAGE = {
    "cut short": cut_short,
    "a bit flipped": flip_a_bit,
    "another report": change_the_report,
    "half a report": lambda entry: (entry / cache.ABOUT).write_text("{"),
    "a report of another kind": lambda entry: (entry / cache.ABOUT).write_text("[1]"),
    "no report": lambda entry: (entry / cache.ABOUT).unlink(),
    "no examples": lambda entry: (entry / cache.EXAMPLES).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(damage, load, folder, monkeypatch):
    before, lines = load()
    before = before.to_list()
    DAMAGE[damage](folder / entries(folder)[0])
    again, again_lines = load()
    assert (again.to_list(), again_lines) == (before, lines)
    forbid_making(monkeypatch)
    assert load()[0].to_list() == before


def test_what_a_killed_start_leaves_is_no_entry(load, folder):
    """Its folder has another name until it is whole, and its lock is free."""
    load()
    (name,) = entries(folder)
    (folder / name).rename(folder / f"{name}.partial")
    (folder / f"{name}.partial" / cache.ABOUT).unlink()
    found, _ = load()
    assert len(found) == 198
    assert entries(folder) == [name]


def test_of_starts_at_once_one_makes_and_all_get_the_same(load, folder, monkeypatch):
    """In threads, which flock keeps apart too: a fork may copy a lock that another holds."""
    makes, made, everyone = Loader._blocks, [], threading.Barrier(3)
    monkeypatch.setattr(Loader, "_blocks", lambda self: made.append(1) or makes(self))

    def start(_):
        everyone.wait()
        return json.dumps(load()[0].to_list())

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(start, range(3)))
    assert len(set(found)) == 1
    assert made == [1]
    assert len(entries(folder)) == 1


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_kept(load, folder, monkeypatch):
    makes = Loader._blocks

    def changed(self):
        yield from makes(self)
        load.path.write_text(load.path.read_text().replace("q0", "Q0"))

    monkeypatch.setattr(Loader, "_blocks", changed)
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read\. Start again"):
        load()
    assert entries(folder) == []


def test_a_full_disk_is_one_error_that_says_what_helps(load, folder, monkeypatch):
    def full(_columns):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loading.Columns, "close", full)
    with pytest.raises(ConfigError, match=r"cannot be written .*No space.*set HF_DATASETS_CACHE"):
        load()
    assert entries(folder) == []


def test_refused_data_leaves_nothing(load, folder):
    with pytest.raises(DataError, match="none of 200 rows can be used"):
        load(max_length=2)
    assert entries(folder) == []


def test_nothing_is_kept_where_it_is_switched_off_or_cannot_be_told(
    load, folder, tokenizer, monkeypatch
):
    load(template=lambda example: example.instruction)  # could do anything the next time
    monkeypatch.setattr(type(tokenizer), "__module__", "my_module")
    load()
    monkeypatch.undo()
    assert not folder.exists()


def test_datasets_switch_of_its_cache_holds_here_too(load, folder):
    datasets.disable_caching()
    try:
        assert len(load()[0]) == 198
    finally:
        datasets.enable_caching()
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_is_done_without(load, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    assert len(load()[0]) == 198


def test_a_chat_template_that_prints_the_date_is_named_by_it(make_tokenizer, monkeypatch):
    class Tomorrow(cache.datetime.datetime):
        @classmethod
        def now(cls, _zone=None):
            return cls(2099, 1, 2)

    dated = make_tokenizer(chat_template='{{ strftime_now("%d %b %Y") }}{{ messages }}')
    today = cache._about_tokenizer(dated)
    assert cache._about_tokenizer(dated) == today
    monkeypatch.setattr(cache.datetime, "datetime", Tomorrow)
    assert cache._about_tokenizer(dated) != today
    assert ["02 Jan 2099"] in cache._about_tokenizer(dated)
    timed = make_tokenizer(chat_template="{{ strftime_now(form) }}{{ messages }}")
    assert cache._about_tokenizer(timed) is None


def test_python_collects_cycles_again_after_a_load_that_failed(load):
    assert gc.isenabled()
    with pytest.raises(DataError):
        load(max_length=2)
    assert gc.isenabled()


def test_slices_of_a_split_share_no_entry(write, tokenizer, folder, monkeypatch):
    """They lie in the same files of the Hub's cache."""
    path = str(write("hub.jsonl", [{"prompt": f"q{i}", "completion": "a"} for i in range(10)]))
    of_file = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda _name, _config, split: of_file("json", data_files=path, split=split),
    )
    settings = {"template": "plain", "say": lambda _: None}
    found = [
        len(load_documents("own/er", tokenizer, split=split, **settings))
        for split in ("train", "train[:30%]", "train[70%:]")
    ]
    assert found == [10, 3, 3]
    assert len(entries(folder)) == 3


def test_prompts_kept_have_the_columns_of_those_in_memory(write, tokenizer, folder, monkeypatch):
    rows = [{"question": "q", "answer": "#### 1", "images": []}] * 3
    path, found = write("images.jsonl", rows), []
    for _ in range(2):
        found.append(load_prompts(path, tokenizer, template="plain", say=lambda _: None))
    monkeypatch.setattr(loading, "MIN_KEPT_BYTES", 1)
    in_memory = load_prompts(rows, tokenizer, template="plain", say=lambda _: None)
    assert len(entries(folder)) == 1
    assert found[0].column_names == found[1].column_names == in_memory.column_names
