"""What a teacher is asked, and what it answers.

What every teacher offers, and how it says that it cannot answer.

Which teacher a recipe's settings name; only its own libraries are loaded.

A teacher that only repeats what was recorded: for runs offline, and for going back over one.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from posttrain.errors import PosttrainError

CHARACTERS_PER_TOKEN = 4  # of English, roughly; used where a server does not count


@dataclass(frozen=True)
class Request:
    """One prompt, and how its answer is drawn.

    name: unique in a run, with its stage and number: `tasks-00003`. max_tokens: of the answer.
    stop: texts before which an answer ends. seed: for teachers that draw by themselves.
    """

    name: str
    prompt: str
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    @property
    def key(self) -> str:
        """The same for the same request only: 16 hexadecimal digits of its content's hash."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answer:
    """What came back.

    finish_reason: `length` for an answer that was cut at max_tokens, `failed` for none at all,
    whose reason is `problem`. attempts: how often the request was sent. estimated: the server
    did not count the tokens, so they are CHARACTERS_PER_TOKEN a token.
    """

    text: str
    finish_reason: Literal["stop", "length", "failed"] = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 1
    estimated: bool = False
    problem: str = ""


def estimate_tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


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
