"""The log of a run and recordings: nothing is asked twice, and what does not fit is refused."""

import pytest

from posttrain.errors import DataError
from posttrain.self_instruct.log import AnswerLog, ReplayTeacher
from posttrain.self_instruct.teacher import Answer, Request
from tests.self_instruct.conftest import FunctionTeacher, ask, make_asker, make_request


def test_a_log_line_that_is_broken_names_its_row(tmp_path):
    path = tmp_path / "requests.jsonl"
    AnswerLog(path).add(make_request(), Answer("x"))
    path.write_text(path.read_text() + '{"request": 1}\n')
    with pytest.raises(DataError, match="row 2: expected a request and its answer"):
        AnswerLog(path)


def test_a_log_line_that_was_edited_by_hand_is_refused(tmp_path):
    path = tmp_path / "requests.jsonl"
    AnswerLog(path).add(make_request(), Answer("x"))
    path.write_text(path.read_text().replace("prompt 0", "prompt 1"))
    with pytest.raises(DataError, match="edited by hand"):
        AnswerLog(path)


def test_a_half_written_last_line_is_asked_again_and_the_next_is_not_glued_to_it(tmp_path, capsys):
    requests = [make_request(i) for i in range(3)]
    first = make_asker(tmp_path, FunctionTeacher(lambda r: r.name))
    ask(first, requests)
    whole = first.log.path.read_bytes()
    first.log.path.write_bytes(whole[:-25])
    teacher = FunctionTeacher(lambda r: r.name)
    ask(make_asker(tmp_path, teacher), requests)
    assert teacher.asked == ["tasks-00002"]
    assert first.log.path.read_bytes() == whole
    assert "its last line was cut off" in capsys.readouterr().out


def test_a_request_that_changed_since_it_was_logged_is_not_paid_for_again(tmp_path):
    ask(make_asker(tmp_path, FunctionTeacher(lambda _: "x")), [make_request()])
    teacher = FunctionTeacher(lambda _: "x")
    asker = make_asker(tmp_path, teacher)
    assert ask(asker, [make_request(temperature=0.5)]) == []
    assert "temperature: recorded 1.0, asked now 0.5" in str(asker.error)
    assert teacher.asked == []


def test_a_recording_answers_what_it_knows_and_says_where_it_ends(tmp_path):
    path = tmp_path / "recorded.jsonl"
    log = AnswerLog(path)
    for number in range(3):
        log.add(make_request(number), Answer(f"answer {number}"))
    asker = make_asker(tmp_path, ReplayTeacher(path))
    found = ask(asker, [make_request(i) for i in range(5)])
    assert [text for _, text in found] == ["answer 0", "answer 1", "answer 2"]
    assert asker.stopped == f"{path} has no answer to tasks-00003: the recording ends there"
    assert asker.error is None


def test_a_recording_for_another_prompt_names_the_first_difference(tmp_path):
    path = tmp_path / "recorded.jsonl"
    AnswerLog(path).add(make_request(), Answer("x"))
    changed = Request("tasks-00000", "prompt 0 changed", max_tokens=50)
    asker = make_asker(tmp_path, ReplayTeacher(path))
    assert ask(asker, [changed]) == []
    assert "prompt, character 8: recorded 'prompt 0', asked now 'prompt 0 changed'" in str(
        asker.error
    )


def test_a_recording_that_is_not_there_says_so(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        ReplayTeacher(tmp_path / "nothing.jsonl")
