"""A teacher that only repeats what was recorded: for runs offline, and for going back over one."""

from collections.abc import Sequence
from pathlib import Path

from posttrain.data.self_instruct.exchange import Answer, Request
from posttrain.teachers.interface import NoMoreAnswers
from posttrain.teachers.log import Recording


class ReplayTeacher:
    """Answers from a file in the format of a run's requests.jsonl.

    A request that is unknown there is the recording's end; one that has changed is an error.
    """

    requests_per_call = calls_at_once = 1

    def __init__(self, path: str | Path) -> None:
        self._recording = Recording(path)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        pass

    def _answer(self, request: Request) -> Answer:
        answer = self._recording.get(request)
        if answer is None:
            raise NoMoreAnswers(
                f"{self._recording.path} has no answer to {request.name}: the recording ends there"
            )
        return answer
