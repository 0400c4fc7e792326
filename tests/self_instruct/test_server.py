"""The server teacher against a real server that misbehaves on purpose."""

import threading
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from huggingface_hub import constants
from tenacity import wait_none

from posttrain.errors import ConfigError
from posttrain.self_instruct import server as module
from posttrain.self_instruct.server import ServerTeacher
from posttrain.self_instruct.teacher import NoAnswer, TeacherError
from tests.self_instruct.chat_server import (
    half_a_body,
    half_a_body_of_unknown_length,
    json_body,
    serve,
    slow,
    status,
    text,
)
from tests.self_instruct.conftest import make_request

KEY = "sk-very-secret"
pytestmark = pytest.mark.usefixtures("network")


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF", wait_none())


def ask(server, **settings):
    settings = {"timeout_seconds": 5.0, "max_attempts": 3, **settings}
    request = settings.pop("request", make_request())
    (answer,) = ServerTeacher(server.url, **settings).answer([request])
    return answer


def test_a_request_is_sent_as_the_protocol_says():
    request = make_request(
        temperature=0.5, top_p=0.9, presence_penalty=1.5, stop=("\n21. ",), seed=3
    )
    with serve() as server:
        ask(server, request=request, model="a/model", key=KEY)
    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions"
    assert asked["headers"]["authorization"] == f"Bearer {KEY}"
    body = asked["body"]
    assert body.pop("stream") is False
    assert body == {
        "model": "a/model",
        "messages": [{"role": "user", "content": "prompt 0"}],
        "max_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.9,
        "presence_penalty": 1.5,
        "stop": ["\n21. "],
    }


def test_settings_that_say_nothing_are_not_sent():
    with serve() as server:
        ask(server, model="m")
    assert not {"top_p", "presence_penalty", "stop", "seed"} & set(server.asked[0]["body"])


def test_without_a_key_the_token_of_the_hub_stays_here(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    with serve() as server:
        ask(server)
    assert "hf_private" not in str(server.asked[0]["headers"])


def test_the_servers_own_token_counts_are_taken():
    with serve(text("hello", usage={"prompt_tokens": 7, "completion_tokens": 2})) as server:
        answer = ask(server)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.estimated) == (7, 2, False)


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": "x"}, {"prompt_tokens": 3}])
def test_without_usable_counts_tokens_are_characters_by_four_and_it_says_so(usage):
    """`prompt 0` has 8 characters, `hello` 5."""
    with serve(text("hello", usage=usage)) as server:
        answer = ask(server)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.estimated) == (2, 2, True)


def test_an_answer_cut_by_length_says_so():
    with serve(text("cut o", finish_reason="length"), text("whole")) as server:
        assert ask(server).finish_reason == "length"
        assert ask(server).finish_reason == "stop"


MISBEHAVIOURS = {
    "429": status(429),
    "500": status(500, b"oops"),
    "503 with a page": status(503, b"<html>busy</html>", content_type="text/html"),
    "408": status(408),
    "too slow": slow(0.5),
    "half a body": half_a_body,
    "half a body of unknown length": half_a_body_of_unknown_length,
    "no JSON": lambda handler: handler.send(b"hello"),
    "no UTF-8": lambda handler: handler.send(b"\xff\xfe{"),
    "nothing": lambda handler: handler.send(b""),
    "a list": json_body([1, 2]),
    "another object": json_body({"error": "busy"}),
    "choices of another kind": json_body({"choices": [1]}),
    "choices as text": json_body({"choices": "none"}),
    "empty choices": json_body({"choices": []}),
    "no message": json_body({"choices": [{"finish_reason": "stop"}]}),
    "no text": json_body({"choices": [{"message": {"content": None}}]}),
}


def test_a_passing_problem_is_asked_again():
    wrong = []
    for name, reply in MISBEHAVIOURS.items():
        with serve(reply, reply, default=text("at last")) as server:
            answer = ask(server, timeout_seconds=0.2)
        found = (answer.text, answer.attempts, len(server.asked))
        wrong += [(name, found)] * (found != ("at last", 3, 3))
    assert wrong == []


def test_a_problem_that_stays_is_given_up_after_so_many_attempts():
    wrong = []
    for name, reply in MISBEHAVIOURS.items():
        with serve(default=reply) as server, pytest.raises(NoAnswer) as failure:
            ask(server, timeout_seconds=0.2, max_attempts=2)
        found = (failure.value.attempts, len(server.asked), bool(failure.value.problem))
        wrong += [(name, found)] * (found != (2, 2, True))
    assert wrong == []


def test_a_server_that_is_not_there_is_a_passing_problem_too():
    with serve() as server:
        pass
    with pytest.raises(NoAnswer, match="ConnectError"):
        ask(server, max_attempts=1)


def waits_for(monkeypatch, retry_after):
    """The seconds that the teacher waits between its attempts, without waiting them."""
    waits = []
    monkeypatch.setattr(module, "sleep_using_event", lambda _event: waits.append)
    with serve(status(429, retry_after=retry_after)) as server:
        assert ask(server).attempts == 2
    return waits


def test_retry_after_is_waited_for_in_seconds_or_until_a_date(monkeypatch):
    assert waits_for(monkeypatch, "0.3") == [0.3]
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=500), usegmt=True)
    (wait,) = waits_for(monkeypatch, date)
    assert 200 < wait <= 500


def test_retry_after_beyond_patience_gives_up_at_once_and_says_why():
    with serve(default=status(429, retry_after="86400")) as server:
        with pytest.raises(NoAnswer, match="asks to wait for 86,400 s"):
            ask(server)
        assert len(server.asked) == 1


def test_a_retry_after_that_is_nonsense_is_passed_over():
    with serve(status(503, retry_after="soon")) as server:
        assert ask(server).attempts == 2


def test_without_retry_after_waits_grow(monkeypatch):
    waits = []
    monkeypatch.setattr(module, "BACKOFF", lambda state: waits.append(state.attempt_number) or 0)
    with serve(status(500), status(500)) as server:
        ask(server)
    assert waits == [1, 2]


def test_closing_ends_a_wait(monkeypatch):
    """A wait of ten minutes; the deadlines here only keep a broken test from hanging."""
    is_waiting, sleep_using_event = threading.Event(), module.sleep_using_event

    def announced(event):
        sleep = sleep_using_event(event)
        return lambda seconds: is_waiting.set() or sleep(seconds)

    monkeypatch.setattr(module, "sleep_using_event", announced)
    with serve(default=status(429, retry_after="600")) as server:
        teacher = ServerTeacher(server.url, max_attempts=5)
        failures = []

        def answer():
            try:
                teacher.answer([make_request()])
            except NoAnswer as failure:
                failures.append(failure)

        asking = threading.Thread(target=answer, daemon=True)
        asking.start()
        assert is_waiting.wait(timeout=60)
        teacher.close()
        asking.join(timeout=60)
    (failure,) = failures
    assert failure.attempts < 5


@pytest.mark.parametrize("code", [401, 402, 403, 404])
def test_what_no_other_request_could_change_ends_the_run_at_once(code):
    with serve(default=status(code, b"no such model")) as server:
        with pytest.raises(TeacherError, match=f"HTTP {code}: no such model"):
            ask(server)
        assert len(server.asked) == 1


def test_a_prompt_that_the_server_refuses_is_given_up_without_another_try():
    with serve(default=status(400, b"content filter")) as server:
        with pytest.raises(NoAnswer, match="HTTP 400: content filter") as failure:
            ask(server)
        assert failure.value.attempts == len(server.asked) == 1


@pytest.mark.parametrize("code", [401, 400, 500])
def test_the_key_is_in_no_error(code):
    with (
        serve(default=status(code, f"bad key {KEY} given".encode())) as server,
        pytest.raises((TeacherError, NoAnswer)) as failure,
    ):
        ask(server, key=KEY, max_attempts=1)
    assert "bad key <key> given" in str(failure.value)
    assert KEY not in str(failure.value)


URLS = [
    ("localhost:8000", "expected a URL"),
    ("ftp://host/v1", "expected a URL"),
    ("http://me:secret@host/v1", "without user"),
    ("http://host/v1?key=secret", "without user"),
]


@pytest.mark.parametrize(("url", "message"), URLS)
def test_a_url_that_cannot_be_used_is_refused_before_anything_is_sent(url, message):
    with pytest.raises(ConfigError, match=message) as failure:
        ServerTeacher(url)
    assert "secret" not in str(failure.value)


def test_offline_mode_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        ServerTeacher("http://localhost:8000/v1")
