"""Does a program do what its tests want? Decided outside of the process that runs it.

    judge_program("def double(x): return 2 * x", read_tests(["assert double(2) == 4"]), sandbox)
    # Verdict(score=1.0, reason="passed", passed=1, total=1)

The sandbox that holds the solution gets its code and its inputs, and gives plain data. It never
sees an expected output, an assertion, or how it is scored. What an assertion compares with a
literal is decided here. Any other test code runs in a second, clean sandbox: the judge, which never
sees the solution's code (`judge_program`). A call there goes over this process to the solution
as plain data, and so does its result. Hence a function that changes a list it is given in place
changes its own copy: tests have to look at what it returns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.programs.splitting import INSIDE, SourceTest
from posttrain.programs.tests import CodeTests, ProgramTest
from posttrain.sandbox.interface import Executor, Limits, Session, Value

# Of a program test, and of all asserts together. On a busy machine a second of work takes three.
TEST_LIMITS = Limits(wall_seconds=15.0, cpu_seconds=5.0)
MAX_SESSIONS = 3  # how often a solution that ends itself is started for the next test
MAX_REASON_CHARS = 200
EXITS = ("SystemExit", "KeyboardInterrupt", "GeneratorExit")


class Verdict(NamedTuple):
    """`score`: what the answer earns, or None where nobody can tell: the tests cannot be run, or
    the sandbox failed. `reason` opens with its kind, which ends at the colon if there is one.
    `passed` of `total` tests; with all or nothing the first that fails ends the judging.
    """

    score: float | None
    reason: str
    passed: int = 0
    total: int = 0


class Outcome(NamedTuple):
    """Of one test. `problem` is empty where it passed; after the last one no more are run."""

    problem: str = ""
    is_last: bool = False


class UnusableTests(Exception):
    """The tests cannot be run, whatever the solution."""


class ExecutorFailed(Exception):
    """The executor could not do its work, which says nothing about the solution."""


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
        limits: For each program test, and once for all asserts.
        partial_credit: The score is the share of tests passed; else 1 for all, 0 otherwise. A
            timeout ends the judging, and the tests left then count as failed.
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
    """One for each test, the cheap ones first."""
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
    """The tests that need a judge, all in one run of it. Those it did not come to are left out."""
    examination = Examination(tests, solution, stops_early=stops_early)
    # It waits for the solution, which may use up its limits in each of its sessions.
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
        # What the solution gave kept the test busy for too long, or was too large for it.
        problem = f"the test ended with {result.status}, {result.detail}"
        examination.outcomes.append(Outcome(problem, is_last=True))
    return examination.outcomes


@functools.cache
def judge_program_code() -> str:
    return Path(__file__).with_name("judge_program.py").read_text(encoding="utf-8")


class Examination:
    """What the judge asks for and reports, over its `host_call`."""

    def __init__(self, tests: list[SourceTest], solution: Solution, *, stops_early: bool) -> None:
        self.outcomes: list[Outcome] = []
        self.failure: Exception | None = None
        self.is_in_test = False
        self._tests = tests
        self._solution = solution
        self._stops_early = stops_early
        self._gone: Outcome | None = None

    def answer(self, message: tuple) -> Any:
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
        """Whether the judge should go on."""
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
        # A test that catches everything may take the end of the solution for what it wanted.
        self.outcomes.append(self._gone or Outcome("" if report == "passed" else report))

    def _ask(self, request: tuple) -> tuple[str, Any]:
        value = self._solution.ask(request)
        if value.status == "ok":
            return "value", value.data
        if value.status == "error" and not has_exited(value):
            return "raised", value.detail
        self._gone = self._gone or Outcome(value.detail or value.status, value.status == "timeout")
        return "gone", value.detail


def _for_the_judge(test: SourceTest) -> dict[str, Any]:
    return {
        "preamble": test.preamble,
        "source": test.source,
        "names": test.names,
        "modules": test.modules,
        "entry_point": test.entry_point,
        "inside": INSIDE,
    }


def has_exited(value: Value) -> bool:
    """Did it end, or ask to, instead of raising an error? An error reads "ValueError: …"."""
    kind, colon, _ = value.detail.partition(":")
    return not colon or not kind.isidentifier() or kind in EXITS


class Solution:
    """A solution's session, opened when it is needed, and again where it has ended."""

    def __init__(self, code: str, executor: Executor, limits: Limits) -> None:
        self._open: Callable[[], Session] = functools.partial(executor.open, code, limits=limits)
        self._session: Session | None = None
        self._num_sessions = 0
        self._last = Value("ok")

    def begin_test(self) -> None:
        """A test starts with a session that lives, unless too much was used up before."""
        is_well = self._session is None or self._last.status == "ok"
        may_start = self._num_sessions < MAX_SESSIONS
        if not is_well and may_start and self._ask(("evaluate", "0")).status != "ok":
            self._close()

    def ask(self, request: tuple) -> Value:
        """("call", name, args, kwargs) or ("evaluate", expression); ExecutorFailed."""
        self._last = self._ask(request)
        return self._last

    def _ask(self, request: tuple) -> Value:
        if self._session is None:
            self._session = self._open().__enter__()
            self._num_sessions += 1
        kind, *arguments = request
        value = getattr(self._session, kind)(*arguments)
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
