"""The client of a server's log-probs, against a real server on this machine."""

import json
import math

import pytest
from tenacity import wait_none

from posttrain.errors import ConfigError, DataError
from posttrain.self_instruct import server as module
from posttrain.self_instruct.logprobs import LogprobServer
from posttrain.self_instruct.teacher import TeacherError
from tests.conftest import make_tokenizer
from tests.self_instruct.chat_server import json_body, serve, status

KEY = "sk-very-secret"
EXAMPLE = {"input_ids": [5, 6, 7], "trained": [False, True, True], "row": 0}


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF", wait_none())


def entry(logp, text):
    return {"logprob": logp, "rank": 1, "decoded_token": text}


def prompt_logprobs(*texts):
    """Two tokens at each place but the first, as vLLM answers: the top one and the one sent."""
    places = [None, {"9": entry(-0.5, "9"), "6": entry(-1.5, texts[0])}]
    places.append({"7": entry(-0.1, texts[1]), "8": entry(-3.0, "8")})
    return json_body({"choices": [{"text": "", "prompt_logprobs": places}]})


FINE = prompt_logprobs("6", "7")


def ask(server, **settings):
    own = {"top_k": 2, "tokenizer": make_tokenizer(), "max_attempts": 3}
    return LogprobServer(server.url, **{**own, **settings})


def test_log_probs_of_the_prompt_come_as_ids_of_each_trained_token():
    with serve(default=FINE) as server:
        (found,) = ask(server, model="m", key=KEY)([EXAMPLE])
    (asked,) = server.asked
    assert asked["path"] == "/v1/completions"
    assert asked["headers"]["authorization".title()] == f"Bearer {KEY}"
    assert asked["body"] == {
        "model": "m", "prompt": [5, 6, 7], "prompt_logprobs": 2, "max_tokens": 1, "temperature": 1,
    }  # fmt: skip
    assert found["top_ids"] == [[9, 6], [7, 8]]
    assert found["top_logps"] == [[-0.5, -1.5], [-0.1, -3.0]]
    assert found["row"] == 0


def test_an_echo_names_tokens_by_id_or_by_text():
    """A text that no single token has stays out, so that it is in the tail of the loss."""
    tops = [None, {"token_id:9": -0.5, "token_id:6": -1.5}, {"7": -0.1, "nothing": -4.0}]
    tops.append({"token_id:1": -0.2})  # of the token that was generated
    reply = json_body({"choices": [{"text": "", "logprobs": {"top_logprobs": tops}}]})
    with serve(default=reply) as server:
        (found,) = ask(server, api="echo")([EXAMPLE])
    assert server.asked[0]["body"]["echo"] is True
    assert found["top_ids"] == [[9, 6], [7]]


def test_what_is_known_is_not_asked_again_by_a_resumed_run(tmp_path):
    path = tmp_path / "logprobs.jsonl"
    other = {**EXAMPLE, "trained": [False, False, True]}
    with serve(default=FINE) as server:
        first = ask(server, path=path)
        once = first([EXAMPLE, other])
        first([EXAMPLE])
        with path.open("a") as file:
            file.write('{"input_ids": [1')  # killed in the middle of a line
        again = ask(server, path=path)([EXAMPLE, other])
        assert len(server.asked) == 2
    assert once == again
    assert [json.loads(line)["top_ids"] for line in path.read_text().splitlines()]
    path.write_text("nonsense\n")
    with pytest.raises(DataError, match="is damaged"):
        ask(server, path=path)([EXAMPLE])


def test_what_passes_is_asked_again_and_a_refusal_is_not():
    with serve(status(503), status(429), default=FINE) as server:
        ask(server).check(EXAMPLE)
        assert len(server.asked) == 3
    refused = pytest.raises(TeacherError, match="no answer in 3 attempts")
    with serve(default=status(500)) as server, refused:
        ask(server)([EXAMPLE])
    with serve(default=status(401, f"bad key {KEY}".encode())) as server:
        with pytest.raises(TeacherError, match=r"server refuses\. HTTP 401: bad key <key>"):
            ask(server, key=KEY).check(EXAMPLE)
        assert len(server.asked) == 1


WRONG = {
    "is not the student's: of 2 tokens 0": prompt_logprobs("horse", "cart"),
    "expected log-probs of all 3 tokens that were sent, found none": json_body(
        {"choices": [{"text": "fine"}]}
    ),
    "found 1 places": json_body({"choices": [{"prompt_logprobs": [None]}]}),
    "a token came without a log-prob": json_body(
        {"choices": [{"prompt_logprobs": [None, {"6": entry(-math.inf, "6")}, {}]}]}
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_server_that_cannot_teach_is_refused_before_training(message):
    with serve(default=WRONG[message]) as server, pytest.raises(TeacherError, match=message):
        ask(server).check(EXAMPLE)


def test_no_address_of_a_server_is_refused():
    with pytest.raises(ConfigError, match="expected a URL such as"):
        LogprobServer("localhost", top_k=2, tokenizer=make_tokenizer())
