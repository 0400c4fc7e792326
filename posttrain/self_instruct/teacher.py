"""Teacher: what it is asked, what it answers, and how it says that it cannot.

    (answer,) = teacher.answer([Request("tasks-00000", prompt, max_tokens=512)])
    answer.text, answer.finish_reason

Teachers are ServerTeacher (server.py), LocalTeacher (local.py) and ReplayTeacher (log.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from posttrain.errors import PosttrainError

CHARACTERS_PER_TOKEN = 4  # of English, roughly; used where a server does not count


@dataclass(frozen=True)
class Request:
    """One prompt, and how its answer is sampled.

    name: unique in a run, with its stage and number: `tasks-00003`. max_tokens: tokens of the
    answer at most. stop: texts before which an answer ends. seed: for teachers that sample here.
    schema: the JSON schema that a server holds the answer to.
    """

    name: str
    prompt: str
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    schema: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """16 hexadecimal digits of the content's hash, by which equal requests are recognised."""
        parts = dataclasses.asdict(self)
        if self.schema is None:  # as before there were schemas
            del parts["schema"]
        content = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answer:
    """The text that came back, and what it took.

    finish_reason: `length` for an answer that was cut at max_tokens, `failed` for none at all,
    whose reason is `problem`. attempts: number of times the request was sent. estimated: the server
    did not count the tokens, so CHARACTERS_PER_TOKEN characters count as one.
    """

    text: str
    finish_reason: Literal["stop", "length", "failed"] = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 1
    estimated: bool = False
    problem: str = ""


def estimate_tokens(text: str) -> int:
    """Number of tokens of a text, by its length, rounded up."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


class TeacherError(PosttrainError):
    """Raised if no further request can succeed until the user fixes a key, a URL or a recording."""


class NoAnswer(Exception):
    """Raised if one request stayed without an answer, however often it was sent."""

    def __init__(self, problem: str, attempts: int = 1) -> None:
        super().__init__(problem)
        self.problem, self.attempts = problem, attempts


class NoMoreAnswers(Exception):
    """Raised if the teacher has come to its end, as a recording does."""


class Teacher(Protocol):
    """Answers requests, a few at a time.

    requests_per_call: number of requests that one call takes together. calls_at_once: number of
    calls that may run at the same time, in threads.
    """

    requests_per_call: int
    calls_at_once: int

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer to each. Raises NoAnswer, NoMoreAnswers or TeacherError."""
        ...

    def close(self) -> None:
        """Stop waiting, so that calls that are under way end soon."""
        ...
