"""Verdicts: prompts in, numbers out, with a file of answers, a budget and threads in between.

    verdicts = Verdicts(teacher, Budget(max_requests=1000), path=run / "judgements.jsonl")
    verdicts.ask([prompt, …], read_score)       # numbers; None where there is no verdict

Equal prompts are asked once in a run. What was answered is in the file, from which a resumed run
reads it; a prompt without an answer is asked again when it comes again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.pieces import count_verdict
from posttrain.run.options import say
from posttrain.self_instruct.asking import Budget
from posttrain.self_instruct.log import AnswerLog, read_answers
from posttrain.self_instruct.teacher import Answer, NoAnswer, Request, Teacher, TeacherError

FAILED = "judge failed"  # the kind of verdict (posttrain.rewards.pieces) that is counted

Read = Callable[[str], float]


class Verdicts:
    """Asks a teacher for verdicts, about each prompt once.

    Args:
        budget: Limits over the whole run, of this process; spent is also what the file holds.
        path: File of answers; None remembers them in memory.
        max_tokens: Tokens of a verdict at most, its thoughts included.
        temperature: 0 takes the likeliest verdict.
        structured: The teacher is asked to hold its verdicts to their JSON schema.
    """

    def __init__(
        self,
        teacher: Teacher,
        budget: Budget,
        *,
        path: Path | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
        structured: bool = False,
    ) -> None:
        self.teacher, self.budget, self.path = teacher, budget, path
        self.max_tokens, self.temperature = max_tokens, temperature
        self.structured = structured
        self._known: dict[str, Answer] = {}
        self._log: AnswerLog | None = None
        self._lock = threading.Lock()
        self._spent = ""  # why the budget refused a request
        self._said = False

    def ask(
        self, prompts: Sequence[str], read: Read, *, schema: dict[str, Any] | None = None
    ) -> list[float | None]:
        """Return the verdict on each prompt; None, counted, where none can be had.

        read: f(text) -> a number; ValueError for what is no verdict. schema: of a verdict.

        Raises:
            TeacherError: The server refuses whatever it is asked.
            ConfigError: The budget is spent, and nothing could be asked.
        """
        self._open()
        requests = [self._request(prompt, schema) for prompt in prompts]
        new = {r.name: r for r in requests if r.name not in self._known}
        if new:
            self._fetch(list(new.values()))
        verdicts = [self._read(self._known.get(request.name), read) for request in requests]
        if self._spent and new and all(name not in self._known for name in new):
            raise ConfigError(f"the judge's budget is spent: {self._spent}.")
        return verdicts

    def probe(
        self, prompt: str, read: Read, setting: str, *, schema: dict[str, Any] | None = None
    ) -> None:
        """Ask once, before anything is trained; the answer is not kept.

        Raises:
            TeacherError: There is no answer, or no verdict in it; `setting` names the judge.
        """
        request = self._request(prompt, schema)
        try:
            (answer,) = self.teacher.answer([request])
        except NoAnswer as problem:
            raise TeacherError(
                f"{setting}: the judge gives no answer ({problem}). Is it running, and is this "
                "its address?"
            ) from None
        self.budget.spent.add(answer)
        try:
            read(_whole(answer))
        except ValueError as problem:
            raise TeacherError(
                f"{setting}: its first verdict cannot be read: {problem}. Take a judge that "
                "follows instructions, or more max_tokens, or a server with structured: true."
            ) from None

    def _request(self, prompt: str, schema: dict[str, Any] | None) -> Request:
        schema = schema if self.structured else None
        settings = {"temperature": self.temperature, "schema": schema}
        request = Request("", prompt, self.max_tokens, **settings)
        return replace(request, name=request.key)

    def _open(self) -> None:
        """Read the file at the first use: by then the run folder is that of this run."""
        if self._log is not None or self.path is None:
            return
        self._log = AnswerLog(self.path)
        for request, answer in read_answers(self.path) if self.path.exists() else ():
            self._known[request.name] = answer
            self.budget.spent.add(answer)

    def _fetch(self, requests: list[Request]) -> None:
        size = self.teacher.requests_per_call
        calls = [requests[i : i + size] for i in range(0, len(requests), size)]
        self._spent = ""
        with ThreadPoolExecutor(self.teacher.calls_at_once) as threads:
            list(threads.map(self._call, calls))

    def _call(self, requests: list[Request]) -> None:
        allowed = [request for request in requests if self._reserve(request)]
        if not allowed:
            return
        try:
            answers = self.teacher.answer(allowed)
        except NoAnswer as failure:
            self._say_once(f"no answer ({failure})")
            lost = Answer("", "failed", attempts=failure.attempts)
            answers = [lost] * len(allowed)
        with self._lock:
            for request, answer in zip(allowed, answers, strict=True):
                self.budget.settle(request, answer)
                if answer.finish_reason == "failed":
                    continue
                self._known[request.name] = answer
                if self._log is not None:
                    self._log.add(request, answer)

    def _reserve(self, request: Request) -> bool:
        with self._lock:
            refusal = self.budget.refusal(request)
            if refusal:
                self._spent = refusal
            else:
                self.budget.reserve(request)
        return not refusal

    def _read(self, answer: Answer | None, read: Read) -> float | None:
        try:
            if answer is not None:
                return read(_whole(answer))
        except ValueError as problem:
            self._say_once(str(problem))
        count_verdict(FAILED)
        return None

    def _say_once(self, problem: str) -> None:
        with self._lock:
            first, self._said = not self._said, True
        if first:
            say(
                f"judge   no verdict: {problem}. Such completions have no reward from it, and are "
                "counted as judge_failed."
            )


def _whole(answer: Answer) -> str:
    """The text of an answer that came to its end; ValueError otherwise."""
    if answer.finish_reason != "stop":
        raise ValueError(f"the answer was cut at {answer.completion_tokens} tokens")
    return answer.text
