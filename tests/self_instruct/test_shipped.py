"""The shipped seeds and the recorded run: what a person gets who types the command."""

import json
from collections import Counter
from pathlib import Path

import pytest

from posttrain.errors import DataError
from posttrain.self_instruct import load_seed_tasks
from posttrain.self_instruct.filters import (
    ALPACA_BLACKLIST,
    REASONS,
    check_instance,
    check_instruction,
)
from posttrain.self_instruct.rouge import NoveltyPool
from posttrain.self_instruct.teacher import TeacherError
from recipes import self_instruct
from tests.conftest import SHARED

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "data" / "seed_tasks.jsonl"
# Those that only tasks with several instances, or the question for a type, can meet.
SELF_INSTRUCT_ONLY = {"same input, different outputs", "repeated instance", "type unclear"}
THEIR_SEEDS = SHARED / "data" / "self_instruct" / "seed_tasks.jsonl"


@pytest.fixture(scope="module")
def seeds():
    return load_seed_tasks(SEEDS)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_there_are_120_seeds_of_both_types_with_and_without_input(seeds):
    assert len(seeds) >= 120
    assert sum(task.is_classification for task in seeds) >= 30
    assert 0.2 < sum(not task.input for task in seeds) / len(seeds) < 0.5


def test_every_seed_passes_the_filters_that_made_instructions_must_pass(seeds):
    for task in seeds:
        check_instruction(task.instruction, ALPACA_BLACKLIST)
        check_instance(task.input, task.output)


def test_no_two_seeds_are_alike(seeds):
    pool = NoveltyPool()
    for task in seeds:
        assert pool.too_similar(task.instruction) is None, task.instruction
        pool.add(task.instruction)


def test_seeds_begin_in_many_ways(seeds):
    openings = Counter(task.instruction.split()[0] for task in seeds)
    assert len(openings) > 100
    assert max(openings.values()) <= 5


@pytest.mark.skipif(not THEIR_SEEDS.exists(), reason="needs Self-Instruct's own seeds")
def test_no_seed_is_like_one_of_self_instructs(seeds):
    pool = NoveltyPool(task.instruction for task in load_seed_tasks(THEIR_SEEDS))
    assert len(pool) == 175
    assert [task for task in seeds if pool.too_similar(task.instruction)] == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": ""}, "row 9: no 'output'"),
        ({"instruction": 5, "output": "b"}, "row 9: 'instruction' is a number"),
        ({"instruction": "a", "output": "b", "is_classification": "yes"}, "expected true or false"),
    ],
)
def test_a_seed_that_cannot_be_used_names_its_row_and_field(tmp_path, row, message):
    good = {"instruction": "a", "input": "", "output": "b", "is_classification": True}
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [good] * 8 + [row]))
    with pytest.raises(DataError, match=message):
        load_seed_tasks(path)


def test_a_handful_of_seeds_is_not_enough(tmp_path):
    path = tmp_path / "seeds.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n' * 3)
    with pytest.raises(DataError, match="at least 8 seed tasks, found 3"):
        load_seed_tasks(path)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The recipe with its defaults, run from the checkout into a folder of its own."""
    folder = tmp_path_factory.mktemp("default") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        made = self_instruct.main(self_instruct.Config(output_dir=str(folder)))
    return made, folder


def test_the_default_run_keeps_at_least_100_records(default_run):
    made, folder = default_run
    rows = rows_of(folder / "records.jsonl")
    assert len(rows) == len(made.records) >= 100
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)


def test_in_the_default_run_every_filter_of_its_method_has_rejected_something(default_run):
    _, folder = default_run
    reasons = {row["reason"] for row in rows_of(folder / "rejected.jsonl")}
    assert reasons == set(REASONS) - SELF_INSTRUCT_ONLY


def test_the_report_counts_every_item_once(default_run):
    made, folder = default_run
    report = json.loads((folder / "report.json").read_text())
    assert report["kept"] == len(made.records)
    assert sum(report["rejected"].values()) == len(rows_of(folder / "rejected.jsonl"))
    assert report["kept"] + sum(report["rejected"].values()) == 8 * 17
    assert report["stopped"] == ""
    assert report["usage"]["num_requests"] == len(rows_of(folder / "requests.jsonl")) == 8
    assert sum(count for _, _, count in report["verb_noun"]) <= report["kept"]
    assert report["num_verbs"] > 60


def test_run_again_it_answers_from_its_log_and_leaves_the_same_records(
    default_run, monkeypatch, capsys
):
    made, folder = default_run
    before = (folder / "records.jsonl").read_bytes()
    monkeypatch.chdir(ROOT)
    again = self_instruct.main(self_instruct.Config(output_dir=str(folder)))
    assert again.records == made.records
    assert (folder / "records.jsonl").read_bytes() == before
    assert "8 (8 from the log, 0 retries)" in capsys.readouterr().out
    assert not folder.with_name("run.1").exists()


def test_a_recording_for_other_settings_is_refused_and_the_folder_stays_free(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for seed in (1, 2):
        config = self_instruct.Config(output_dir=str(tmp_path / "run"), seed=seed)
        with pytest.raises(TeacherError, match="given to another request"):
            self_instruct.main(config)
    assert not (tmp_path / "run" / "records.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_error_in_the_middle_is_raised_after_what_there_is_has_been_written(
    tmp_path, monkeypatch
):
    first, second, *_ = rows_of(ROOT / "data" / "self_instruct_replay.jsonl")
    changed = {"request": {**second["request"], "prompt": "another"}, "answer": second["answer"]}
    recording = tmp_path / "recording.jsonl"
    recording.write_text(json.dumps(first) + "\n" + json.dumps(changed) + "\n")
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "run"
    with pytest.raises(TeacherError, match="its answer to tasks-00001"):
        self_instruct.main(
            self_instruct.Config(output_dir=str(folder), teacher_replay=str(recording))
        )
    report = json.loads((folder / "report.json").read_text())
    assert report["kept"] == len(rows_of(folder / "records.jsonl")) == 14
    assert "its answer to tasks-00001" in report["stopped"]


def test_more_records_than_were_recorded_end_with_those_and_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config = self_instruct.Config(output_dir=str(tmp_path / "run"), num_records=1000)
    assert len(self_instruct.main(config).records) >= 100
    assert "stopped before there were 1,000: data/self_instruct_replay" in capsys.readouterr().out


def test_the_records_are_read_for_training_with_alpacas_template(default_run):
    from posttrain.data import load_documents
    from posttrain.models.load import load_tokenizer

    made, folder = default_run
    lines = []
    tokenizer = load_tokenizer(str(ROOT / "data" / "tiny_tokenizer"))
    documents = load_documents(
        str(folder / "records.jsonl"), tokenizer, max_length=512, say=lines.append
    )
    assert len(documents) == len(made.records)
    assert "rows of Alpaca" in lines[0]
    texts = [tokenizer.decode(document["input_ids"]) for document in documents]
    for task, text in zip(made.records, texts, strict=True):
        assert ("\n\n### Input:\n" + task.input in text) is bool(task.input)
        assert text.endswith("### Response:" + task.output + tokenizer.eos_token)
