"""Tasks, requests and a teacher made of a function."""

from collections.abc import Callable, Sequence

import pytest
from huggingface_hub import constants

from posttrain.self_instruct.asking import Asker, Budget
from posttrain.self_instruct.log import AnswerLog
from posttrain.self_instruct.tasks import Task
from posttrain.self_instruct.teacher import Answer, Request

VERBS = ("Bake", "Build", "Carry", "Cook", "Count", "Dig", "Drive", "Fold", "Grow", "Knit")


@pytest.fixture
def network(monkeypatch):
    """The suite runs with HF_HUB_OFFLINE, under which huggingface_hub sends nothing anywhere."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def make_seeds() -> list[Task]:
    """Ten tasks with nothing in common, every second one a classification."""
    return [
        Task(f"{verb} alpha{i} beta{i} gamma{i}", f"in{i}", f"out{i}", is_classification=i % 2 == 0)
        for i, verb in enumerate(VERBS)
    ]


def make_request(number: int = 0, **settings) -> Request:
    return Request(f"tasks-{number:05d}", f"prompt {number}", max_tokens=50, **settings)


def requests_from(requests: Sequence[Request]) -> Callable[[], Request | None]:
    remaining = iter(requests)
    return lambda: next(remaining, None)


class FunctionTeacher:
    """Answers with what a function makes of the request; remembers what it was asked."""

    def __init__(self, answer, *, calls_at_once: int = 1, requests_per_call: int = 1) -> None:
        self.function = answer
        self.calls_at_once, self.requests_per_call = calls_at_once, requests_per_call
        self.asked: list[str] = []
        self.num_calls = 0
        self.closed = False

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        self.num_calls += 1
        self.asked += [request.name for request in requests]
        found = [self.function(request) for request in requests]
        return [Answer(answer) if isinstance(answer, str) else answer for answer in found]

    def close(self) -> None:
        self.closed = True


def make_asker(tmp_path, teacher, **limits) -> Asker:
    return Asker(teacher, AnswerLog(tmp_path / "requests.jsonl"), Budget(**limits))


def ask(asker, requests) -> list[tuple[str, str]]:
    """(name, text) of everything that is yielded."""
    found = asker.ask(requests_from(requests))
    return [(request.name, answer.text) for request, answer in found]
