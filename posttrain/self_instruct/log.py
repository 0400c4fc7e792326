"""Log: all that was asked and answered, one JSON line each, written as it arrives.

    {"key": …, "request": {"name": "tasks-00003", "prompt": …, …}, "answer": {"text": …, …}}

A run that was killed reads its own log (AnswerLog) and asks none of it again; another run may read
it as a recording (ReplayTeacher), offline.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.run.folder import append_log
from posttrain.run.options import say
from posttrain.self_instruct.teacher import Answer, NoMoreAnswers, Request, TeacherError


class Recording:
    """The answers in a file, each of which belongs to a request of exactly its content."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        recorded = read_answers(self.path)
        self._requests = {request.name: request for request, _ in recorded}
        self._answers = {request.key: answer for request, answer in recorded}

    def get(self, request: Request) -> Answer | None:
        """The answer, or None to a request whose name is not there.

        Raises TeacherError, with the first difference, if the name is there for another request.
        """
        recorded = self._requests.get(request.name)
        if recorded is None:
            return None
        if recorded.key != request.key:
            raise TeacherError(
                f"{self.path}: its answer to {request.name} was given to another request "
                f"({_first_difference(recorded, request)}). Recorded answers fit the method, the "
                "seed and the seed tasks that they were made with. Take those again, or another "
                "teacher and another --output_dir."
            )
        return self._answers[request.key]


class AnswerLog(Recording):
    """A recording that grows: answers are added to its file as they arrive, from any thread."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self._lock = threading.Lock()
        if path.exists():
            _cut_half_line(path)
            super().__init__(path)
        else:  # not made before there is an answer: a run without one left nothing
            self.path, self._requests, self._answers = path, {}, {}

    def add(self, request: Request, answer: Answer) -> None:
        """Append an answer to the file; safe from any thread."""
        line = {
            "key": request.key,
            "request": dataclasses.asdict(request),
            "answer": dataclasses.asdict(answer),
        }
        with self._lock:
            append_log(self.path, line)
            self._requests[request.name] = request
            self._answers[request.key] = answer


class ReplayTeacher:
    """Answers from a file in the format of a run's requests.jsonl.

    A request that is unknown there is the recording's end; one that has changed is an error.
    """

    requests_per_call = calls_at_once = 1

    def __init__(self, path: str | Path) -> None:
        self._recording = Recording(path)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """The recorded answers; NoMoreAnswers or TeacherError for a request without one."""
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        """Do nothing: a recording never waits."""

    def _answer(self, request: Request) -> Answer:
        answer = self._recording.get(request)
        if answer is None:
            raise NoMoreAnswers(
                f"{self._recording.path} has no answer to {request.name}: the recording ends there"
            )
        return answer


def read_answers(path: str | Path) -> list[tuple[Request, Answer]]:
    """All whole lines of a log, in order; DataError for one that is not as a run writes it."""
    path, found = Path(path), []
    if not path.is_file():
        raise DataError(f"{path}: no such file. Expected a recording of a teacher's answers.")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith("\n"):
                found.append(_read_line(line, f"{path}, row {number}"))
    return found


def _read_line(line: str, where: str) -> tuple[Request, Answer]:
    try:
        record: dict[str, Any] = json.loads(line)
        asked = {**record["request"], "stop": tuple(record["request"]["stop"])}
        request, answer = Request(**asked), Answer(**record["answer"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: expected a request and its answer as written by a run, found "
            f"{line[:60]!r} ({type(error).__name__}: {error}). Remove the line to ask it again."
        ) from None
    if record.get("key") not in (None, request.key):
        raise DataError(
            f"{where}: the request '{request.name}' was edited by hand (its content has key "
            f"{request.key}, the line says {record['key']}). Remove the line to ask it again."
        )
    return request, answer


def _cut_half_line(path: Path) -> None:
    """Remove half a line that a kill left, since the next line would be glued to it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        say(f"{path}: its last line was cut off by a kill; that request is asked again.")
        os.truncate(path, whole)


def _first_difference(recorded: Request, asked: Request) -> str:
    for name, old in vars(recorded).items():
        new = getattr(asked, name)
        if old == new:
            continue
        if name != "prompt":
            return f"{name}: recorded {old!r}, asked now {new!r}"
        pairs = enumerate(zip(old, new, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))
        part = slice(max(0, place - 10), place + 30)
        return f"prompt, character {place}: recorded {old[part]!r}, asked now {new[part]!r}"
    raise AssertionError("two requests of different keys must differ in a field")
