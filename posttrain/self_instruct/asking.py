"""Asker: requests in and answers out, in the same order, with log, budget and threads in between.

    asker = Asker(teacher, AnswerLog(run / "requests.jsonl"), Budget(max_cost=5, …))
    for request, answer in asker.ask(method.next_request):
        method.take(request, answer)

The budget limits requests, tokens and money, counted over all of a run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from posttrain.errors import ConfigError
from posttrain.self_instruct.log import AnswerLog
from posttrain.self_instruct.teacher import (
    Answer,
    NoAnswer,
    NoMoreAnswers,
    Request,
    Teacher,
    TeacherError,
    estimate_tokens,
)

# One request may be what a server cannot swallow; three in a row are a server that is down.
MAX_FAILURES_IN_A_ROW = 3
PRICE_UNIT = 1_000_000  # prices are given for a million tokens

NextRequest = Callable[[], Request | None]


class Asker:
    """Sends requests to a teacher, within a budget, and logs what it answers.

    After `ask`: `stopped` says why it ended although there were more requests, and `error` is what
    the user has to fix first, if anything. num_from_log: requests whose answer was in the log.
    """

    def __init__(self, teacher: Teacher, log: AnswerLog, budget: Budget) -> None:
        self.teacher, self.log, self.budget = teacher, log, budget
        self.num_from_log = 0
        self.stopped = ""
        self.error: TeacherError | None = None
        self._failures_in_a_row = 0
        self._refused: Request | None = None  # waits until the budget has room for it

    def ask(self, next_request: NextRequest) -> Iterator[tuple[Request, Answer]]:
        """Each request with its answer, in the order of the requests.

        next_request: called when there is room for a request; None says that there is none until
        another answer has been taken. It may build on the answers yielded before: which these
        are does not depend on the order in which answers arrive, so that a run repeats itself.

        A request that stayed without an answer gets one with finish_reason `failed`.
        """
        try:
            with ThreadPoolExecutor(self.teacher.calls_at_once) as threads:
                try:
                    yield from self._ask(next_request, threads)
                except BaseException:
                    self.teacher.close()  # else the threads would wait and retry to the end
                    raise
        except TeacherError as error:
            self.error, self.stopped = error, str(error)
        except NoMoreAnswers as end:
            self.stopped = str(end)

    def _ask(
        self, next_request: NextRequest, threads: ThreadPoolExecutor
    ) -> Iterator[tuple[Request, Answer]]:
        under_way: deque[tuple[list[Request], Future[list[Answer]]]] = deque()
        while True:
            while len(under_way) < self.teacher.calls_at_once:
                if not (batch := self._pull(next_request)):
                    break
                under_way.append((batch, threads.submit(self._answer, batch)))
            if not under_way:
                return
            batch, future = under_way.popleft()
            for request, answer in zip(batch, future.result(), strict=True):
                self._check(request, answer)
                self.budget.settle(request, answer)
                yield request, answer

    def _pull(self, next_request: NextRequest) -> list[Request]:
        """The requests of the next call, as many as the budget allows."""
        batch: list[Request] = []
        self.stopped = ""
        while len(batch) < self.teacher.requests_per_call:
            request, self._refused = self._refused or next_request(), None
            if request is None:
                break
            self.stopped = self.budget.refusal(request)
            if self.stopped:
                self._refused = request
                break
            self.num_from_log += self.log.get(request) is not None
            self.budget.reserve(request)
            batch.append(request)
        return batch

    def _answer(self, batch: list[Request]) -> list[Answer]:
        """Answer from the log, else from the teacher and into the log; runs in a thread."""
        known = [self.log.get(request) for request in batch]
        unknown = [request for request, answer in zip(batch, known, strict=True) if not answer]
        if not unknown:
            return known
        try:
            fresh = self.teacher.answer(unknown)
        except NoAnswer as failure:
            failed = Answer("", "failed", attempts=failure.attempts, problem=failure.problem)
            return [answer or failed for answer in known]
        for request, answer in zip(unknown, fresh, strict=True):
            self.log.add(request, answer)
        remaining = iter(fresh)
        return [answer or next(remaining) for answer in known]

    def _check(self, request: Request, answer: Answer) -> None:
        """Log a failure as the answer; end the run at the third in a row, which is not logged.

        So the next run asks the third one again, and passes over the others for good.
        """
        if answer.finish_reason != "failed" or self.log.get(request):
            self._failures_in_a_row = 0
            return
        self._failures_in_a_row += 1
        if self._failures_in_a_row == MAX_FAILURES_IN_A_ROW:
            raise TeacherError(
                f"{MAX_FAILURES_IN_A_ROW} requests in a row stayed without an answer; the last, "
                f"{request.name}: {answer.problem}. All answers so far are in {self.log.path}: "
                "run the same command again to continue from there."
            )
        self.log.add(request, answer)


@dataclass
class Usage:
    """Sums over answers; `num_sent` counts every attempt, `num_failed` requests without answer."""

    num_requests: int = 0
    num_sent: int = 0
    num_failed: int = 0
    num_estimated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: Answer) -> None:
        """Count one answer."""
        self.num_requests += 1
        self.num_sent += answer.attempts
        self.num_failed += answer.finish_reason == "failed"
        self.num_estimated += answer.estimated
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens

    @property
    def tokens(self) -> int:
        """Number of tokens of prompts and answers."""
        return self.prompt_tokens + self.completion_tokens


class Budget:
    """Limits, and what is spent. A request is allowed if its longest answer would still fit.

    max_requests counts every attempt, retries included; max_tokens counts prompts and answers;
    max_cost is in the currency of the two prices, which are per million tokens. None: no limit. The
    tokens of a failed attempt are unknown, and count as none.
    """

    def __init__(
        self,
        *,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        prompt_price: float = 0.0,
        completion_price: float = 0.0,
    ) -> None:
        if max_cost is not None and not (prompt_price or completion_price):
            raise ConfigError(
                "max_cost: expected prices with it, found none. Set prompt_price and "
                "completion_price, per million tokens."
            )
        self.max_requests, self.max_tokens, self.max_cost = max_requests, max_tokens, max_cost
        self.prompt_price, self.completion_price = prompt_price, completion_price
        self.spent = Usage()
        self._reserved: dict[str, tuple[int, int]] = {}  # name -> most (prompt, answer) tokens

    @property
    def cost(self) -> float:
        """The money spent so far, at the given prices."""
        return self._price(self.spent.prompt_tokens, self.spent.completion_tokens)

    def refusal(self, request: Request) -> str:
        """The reason not to send this request beside those under way; empty if it may be sent."""
        most = [*self._reserved.values(), _most_tokens(request)]
        prompt = self.spent.prompt_tokens + sum(tokens for tokens, _ in most)
        completion = self.spent.completion_tokens + sum(tokens for _, tokens in most)
        wanted = {
            "requests": (self.spent.num_sent + len(most), self.max_requests),
            "tokens": (prompt + completion, self.max_tokens),
            "cost": (self._price(prompt, completion), self.max_cost),
        }
        for name, (amount, limit) in wanted.items():
            if limit is not None and amount > limit:
                return f"max_{name} is {limit:,}; with the next request it could be {amount:,.6g}"
        return ""

    def reserve(self, request: Request) -> None:
        """Count a request that is about to be sent, at the most that it can take."""
        self._reserved[request.name] = _most_tokens(request)

    def settle(self, request: Request, answer: Answer) -> None:
        """Count what the request took in the end, in place of what was reserved."""
        self._reserved.pop(request.name, None)
        self.spent.add(answer)

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        prompt = prompt_tokens * self.prompt_price
        return (prompt + completion_tokens * self.completion_price) / PRICE_UNIT


def _most_tokens(request: Request) -> tuple[int, int]:
    return estimate_tokens(request.prompt), request.max_tokens
