"""Judging a program by its tests, outside of the process that runs it.

    judge_program("def double(x): return 2 * x", read_tests(["assert double(2) == 4"]), sandbox)
    # Verdict(score=1.0, reason="passed", passed=1, total=1)

The sandbox of the solution gets its code and its inputs, and returns plain data. It never sees an
expected output, an assertion, or how it is scored. Assertions that compare with a literal are
decided here. All other test code runs in a second, clean sandbox: the judge, which never sees the
solution's code (`judge_program`). Calls that it makes go through this process to the solution as
plain data, and so do their results. Hence a function that changes a list argument in place changes
its own copy: tests have to look at what it returns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from posttrain.programs.splitting import INSIDE, SourceTest
from posttrain.programs.tests import CodeTests, ProgramTest
from posttrain.sandbox.interface import Executor, Limits, Session, Value
from posttrain.sandbox.wire import PlainData

# For a program test, or all asserts together. On a busy machine a second of work takes three.
TEST_LIMITS = Limits(wall_seconds=15.0, cpu_seconds=5.0)
MAX_SESSIONS = 3  # number of times that a solution that ends itself is started again
MAX_REASON_CHARS = 200
EXITS = ("SystemExit", "KeyboardInterrupt", "GeneratorExit")


class Verdict(NamedTuple):
    """The judgement of one program.

    Attributes:
        score: The reward; None if there is no judgement, because the tests cannot be run or the
            sandbox failed.
        reason: The reason for the score. Its kind comes first, up to the colon if there is one.
        passed: Number of tests passed. Without partial credit, the first failure ends the judging.
        total: Number of tests.
    """

    score: float | None
    reason: str
    passed: int = 0
    total: int = 0


class Outcome(NamedTuple):
    """The outcome of one test: `problem` is "" if it passed; after `is_last` no more tests run."""

    problem: str = ""
    is_last: bool = False


class UnusableTests(Exception):
    """The tests cannot be run, whatever the solution is."""


class ExecutorFailed(Exception):
    """The executor failed, which says nothing about the solution."""


def judge_program(
    code: str,
    tests: CodeTests,
    executor: Executor,
    *,
    limits: Limits = TEST_LIMITS,
    partial_credit: bool = False,
) -> Verdict:
    """Run a program against its tests. Never raises for what the program does.

    Args:
        code: The program's source.
        tests: The tests, as `read_tests` returns them.
        executor: Where the program, and test code, runs.
        limits: The limits for each program test, and once for all asserts together.
        partial_credit: The score is the share of tests passed; otherwise 1 for all, else 0. A
            timeout ends the judging, and the remaining tests count as failed.
    """
    problem = ""
    for _ in range(2):
        try:
            return _judge(code, tests, executor, limits, partial_credit)
        except UnusableTests as error:
            return Verdict(None, f"tests cannot be used: {error}", total=tests.num_tests)
        except ExecutorFailed as error:
            problem = f"sandbox failed: {error}"
    return Verdict(None, problem, total=tests.num_tests)


def _judge(
    code: str, tests: CodeTests, executor: Executor, limits: Limits, partial_credit: bool
) -> Verdict:
    passed, reason = 0, ""
    outcomes = _outcomes(code, tests, executor, limits, stops_early=not partial_credit)
    with contextlib.closing(outcomes):
        for outcome in outcomes:
            passed += not outcome.problem
            reason = reason or outcome.problem
            if outcome.is_last or (outcome.problem and not partial_credit):
                break
    total = tests.num_tests
    score = passed / total if partial_credit else float(passed == total)
    return Verdict(
        score, f"failed: {reason}"[:MAX_REASON_CHARS] if reason else "passed", passed, total
    )


def _outcomes(
    code: str, tests: CodeTests, executor: Executor, limits: Limits, *, stops_early: bool
) -> Iterator[Outcome]:
    """Run the tests, the cheap ones first, and yield the outcome of each."""
    if tests.sources:
        with Solution(code, executor, limits) as solution:
            left = []
            for test in tests.sources:
                if test.comparisons:
                    yield _compare(test, solution)
                else:
                    left.append(test)
            if left:
                yield from _examine(left, solution, executor, limits, stops_early=stops_early)
    for program in tests.programs:
        yield _run(code, program, executor, limits)


def _run(code: str, test: ProgramTest, executor: Executor, limits: Limits) -> Outcome:
    result = executor.run(code, stdin=test.stdin, limits=limits)
    if result.status == "failed":
        raise ExecutorFailed(result.detail)
    if result.status != "ok":
        return Outcome(f"{result.status}, {result.detail}", result.status == "timeout")
    problem = test.problem_with(result.stdout)
    return Outcome("too much output" if problem and result.truncated else problem)


def _compare(test: SourceTest, solution: Solution) -> Outcome:
    solution.begin_test()
    for comparison in test.comparisons:
        expression = comparison.expression
        value = solution.ask(("evaluate", expression))
        if value.status != "ok":
            return Outcome(f"{expression[:80]}: {value.detail}", value.status == "timeout")
        if not comparison.holds(value.data):
            return Outcome(f"{expression[:80]}: wrong value")
    return Outcome()


def _examine(
    tests: list[SourceTest],
    solution: Solution,
    executor: Executor,
    limits: Limits,
    *,
    stops_early: bool,
) -> list[Outcome]:
    """Run the tests that need a judge, all in one run; leave out those that it did not reach."""
    examination = Examination(tests, solution, stops_early=stops_early)
    # The judge waits for the solution, which may use up its limits in each of its sessions.
    wall_seconds = (MAX_SESSIONS + 1) * limits.wall_seconds
    result = executor.run(
        judge_program_code(),
        limits=replace(limits, wall_seconds=wall_seconds),
        host_call=examination.answer,
    )
    if result.status == "failed":
        raise ExecutorFailed(result.detail)
    if examination.failure:
        raise examination.failure
    if examination.is_in_test:
        if result.status in ("ok", "error"):
            raise UnusableTests(f"they ended early ({result.detail or 'exit code 0'})")
        # The solution's result kept the test busy for too long, or was too large for it.
        problem = f"the test ended with {result.status}, {result.detail}"
        examination.outcomes.append(Outcome(problem, is_last=True))
    return examination.outcomes


@functools.cache
def judge_program_code() -> str:
    """Read the source of the judge."""
    return Path(__file__).with_name("judge_program.py").read_text(encoding="utf-8")


class Examination:
    """Our side of the judge's `host_call`: it answers its requests and collects the outcomes."""

    def __init__(self, tests: list[SourceTest], solution: Solution, *, stops_early: bool) -> None:
        self.outcomes: list[Outcome] = []
        self.failure: Exception | None = None
        self.is_in_test = False
        self._tests = tests
        self._solution = solution
        self._stops_early = stops_early
        self._gone: Outcome | None = None

    def answer(self, message: tuple[PlainData, ...]) -> PlainData:
        """Answer a message of the judge.

        ("tests",) gives the tests, ("begin",) tells whether to run the next one, ("ended", report)
        takes its outcome; "call" and "evaluate" are requests to the solution.
        """
        kind = message[0]
        if kind == "tests":
            return [_for_the_judge(test) for test in self._tests]
        if kind == "ended":
            return self._end(message[1])
        try:
            return self._begin() if kind == "begin" else self._ask(message)
        except ExecutorFailed as error:
            self.failure = error
            return False if kind == "begin" else ("gone", str(error))

    def _begin(self) -> bool:
        """Begin a test; return whether the judge should run it."""
        is_over = self.failure or (self._stops_early and any(o.problem for o in self.outcomes))
        if is_over or any(outcome.is_last for outcome in self.outcomes):
            return False
        self._gone = None
        self._solution.begin_test()
        self.is_in_test = True
        return True

    def _end(self, report: str) -> None:
        self.is_in_test = False
        if report.startswith("unusable"):
            self.failure = self.failure or UnusableTests(report.partition(": ")[2])
        # A test that catches every exception may take the solution's end for an expected one.
        self.outcomes.append(self._gone or Outcome("" if report == "passed" else report))

    def _ask(self, request: tuple[PlainData, ...]) -> tuple[str, PlainData]:
        value = self._solution.ask(request)
        if value.status == "ok":
            return "value", value.data
        if value.status == "error" and not has_exited(value):
            return "raised", value.detail
        self._gone = self._gone or Outcome(value.detail or value.status, value.status == "timeout")
        return "gone", value.detail


def _for_the_judge(test: SourceTest) -> dict[str, PlainData]:
    return {
        "preamble": test.preamble,
        "source": test.source,
        "names": test.names,
        "modules": test.modules,
        "entry_point": test.entry_point,
        "inside": INSIDE,
    }


def has_exited(value: Value) -> bool:
    """Tell whether the solution ended, or asked to, instead of raising an error ("KeyError: …")."""
    kind, colon, _ = value.detail.partition(":")
    return not colon or not kind.isidentifier() or kind in EXITS


class Solution:
    """A solution's session, opened when it is needed, and again after it has ended."""

    def __init__(self, code: str, executor: Executor, limits: Limits) -> None:
        self._open: Callable[[], Session] = functools.partial(executor.open, code, limits=limits)
        self._session: Session | None = None
        self._num_sessions = 0
        self._last = Value("ok")

    def begin_test(self) -> None:
        """Give the next test a session that lives, unless too many have been used up before."""
        is_well = self._session is None or self._last.status == "ok"
        may_start = self._num_sessions < MAX_SESSIONS
        if not is_well and may_start and self._ask(("evaluate", "0")).status != "ok":
            self._close()

    def ask(self, request: tuple[PlainData, ...]) -> Value:
        """Send a request: ("call", name, args, kwargs) or ("evaluate", expression).

        Raises:
            ExecutorFailed: The executor could not do its work.
        """
        self._last = self._ask(request)
        return self._last

    def _ask(self, request: tuple[PlainData, ...]) -> Value:
        if self._session is None:
            self._session = self._open().__enter__()
            self._num_sessions += 1
        kind, *arguments = request
        send = self._session.call if kind == "call" else self._session.evaluate
        value = send(*arguments)
        if value.status == "failed":
            raise ExecutorFailed(value.detail)
        return value

    def _close(self) -> None:
        if self._session is not None:
            self._session.__exit__(None, None, None)
            self._session = None

    def __enter__(self) -> Solution:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()
