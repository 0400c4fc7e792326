"""What every teacher offers, and how it says that it cannot answer."""

from collections.abc import Sequence
from typing import Protocol

from posttrain.data.self_instruct.exchange import Answer, Request
from posttrain.errors import PosttrainError


class TeacherError(PosttrainError):
    """No further request can succeed until the user mends something: a key, a URL, a recording."""


class NoAnswer(Exception):
    """This one request stayed without an answer, however often it was sent."""

    def __init__(self, problem: str, attempts: int = 1) -> None:
        super().__init__(problem)
        self.problem, self.attempts = problem, attempts


class NoMoreAnswers(Exception):
    """The teacher has come to its end, as a recording does."""


class Teacher(Protocol):
    """Answers requests, a few at a time.

    requests_per_call: how many one call takes together. calls_at_once: how many calls may run at
    the same time, in threads.
    """

    requests_per_call: int
    calls_at_once: int

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer to each. Raises NoAnswer, NoMoreAnswers or TeacherError."""
        ...

    def close(self) -> None:
        """Give up waiting, so that calls that are under way end soon."""
        ...
