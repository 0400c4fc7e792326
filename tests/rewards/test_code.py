"""The code reward around the judging: what is sent where, our own failures, batches, checks."""

import threading
from dataclasses import dataclass, field
from functools import partial

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards.call import Scoring, score
from posttrain.rewards.checks import check_rewards, find_unscorable
from posttrain.rewards.code import code_reward, judge_code, shared_sandbox
from posttrain.sandbox import Limits, RunResult, SandboxUnavailableError, Value

DOUBLE = "def double(x):\n    return 2 * x\n"
SUM = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5\n", "stdout": "10\n"}]
ADDS = "print(sum(map(int, input().split())))"


@dataclass
class Recorder:
    """An executor that fails the first `failures` times it is used, and keeps what it was sent."""

    failures: int = 0
    sent: list = field(default_factory=list)

    def _fails(self):
        self.failures -= 1
        return self.failures >= 0

    def run(self, code, **options):
        self.sent.append((code, options.get("stdin", "")))
        if self._fails():
            return RunResult("failed", detail="no worker")
        return shared_sandbox().run(code, **options)

    def open(self, code, *, limits=None):
        self.sent.append((code, ""))
        session = shared_sandbox().open(code, limits=limits)
        return FailingSession(session) if self._fails() else RecordingSession(session, self.sent)


class FailsAtOpening:
    """An executor whose sessions of these numbers, from 1, fail."""

    def __init__(self, *numbers):
        self.numbers, self.num_opened = numbers, 0
        self.run = shared_sandbox().run

    def open(self, code, *, limits=None):
        self.num_opened += 1
        session = shared_sandbox().open(code, limits=limits)
        return FailingSession(session) if self.num_opened in self.numbers else session


@dataclass
class FailingSession:
    session: object

    def evaluate(self, *_request):
        return Value("failed", detail="no worker")

    call = evaluate

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.session.close()


@dataclass
class RecordingSession:
    session: object
    sent: list

    def evaluate(self, expression):
        self.sent.append((expression, ""))
        return self.session.evaluate(expression)

    def call(self, name, args=(), kwargs=None):
        self.sent.append((name, repr((args, kwargs))))
        return self.session.call(name, args, kwargs)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.session.close()


@pytest.mark.parametrize(
    ("code", "tests"),
    [(DOUBLE, ["assert double(1) == 2"]), (DOUBLE, ["assert [double(1)] == [2]"]), (ADDS, SUM)],
)
def test_a_failure_of_the_sandbox_is_tried_again_once_and_then_gives_no_score(code, tests):
    assert judge_code(code, tests, Recorder(failures=1)).score == 1.0
    verdict = judge_code(code, tests, Recorder(failures=9))
    assert verdict.score is None
    assert verdict.reason == "sandbox failed: no worker"


def test_a_sandbox_that_fails_between_two_tests_is_tried_again_too():
    """The session ends itself in the first test, and the next one cannot be opened."""
    code = "import os\ndef f(x):\n    if x == 1:\n        os._exit(0)\n    return [x]\n"
    tests = [f"assert sorted(f({n})) == [{n}]" for n in (1, 2)]
    executor = FailsAtOpening(2)
    assert judge_code(code, tests, executor, partial_credit=True).score == 0.5
    assert executor.num_opened == 4
    assert judge_code(code, tests, FailsAtOpening(2, 4), partial_credit=True).score is None


def test_the_process_of_the_solution_never_sees_what_is_expected():
    secret = 271828
    code = f"def f(x):\n    return {secret - 1} + x\nif __name__ == '__main__':\n    print(f(1))"
    tests = [
        f"assert f(1) == {secret}",
        f"assert sorted([f(1)]) == [{secret}]",
        f"x = 1\nwanted = {secret}\nassert f(x) == wanted",
        {
            "check": f"def check(candidate):\n    assert candidate(1) == {secret}",
            "entry_point": "f",
        },
        {"stdin": "", "stdout": f"{secret}\n"},
    ]
    recorder = Recorder()
    assert judge_code(code, tests, recorder).score == 1.0
    assert len(recorder.sent) > len(tests)
    assert not [sent for sent in recorder.sent if str(secret) in str(sent)]


def test_five_simple_asserts_take_one_session():
    recorder = Recorder()
    assert judge_code(DOUBLE, [f"assert double({n}) == {2 * n}" for n in range(5)], recorder).score
    assert [sent for sent, _ in recorder.sent].count(DOUBLE) == 1
    assert len(recorder.sent) == 1 + 5


def test_nothing_more_is_run_once_the_score_is_known():
    wrong = "def f(x):\n    return 0\n"
    judged = [f"x = {n}\nassert f(x) == {n}" for n in range(1, 5)]
    recorder = Recorder()
    judge_code(wrong, judged, recorder)
    assert [sent for sent, _ in recorder.sent].count("f") == 1
    recorder = Recorder()
    judge_code("print(1)", [*SUM, *SUM], recorder)
    assert len(recorder.sent) == 1
    hangs = (
        "import time\ndef f(x):\n    while x == 1: time.sleep(1)\n"
        "if __name__ == '__main__':\n    f(1)"
    )
    limits = Limits(wall_seconds=0.5)
    for tests in (judged, SUM):
        recorder = Recorder()
        verdict = judge_code(hangs, tests, recorder, limits=limits, partial_credit=True)
        assert verdict.score == 0.0
        assert [sent for sent, _ in recorder.sent].count(hangs) == 1


def test_the_reward_judges_each_completion_by_its_own_tests():
    completions = [DOUBLE, "no program", [{"role": "assistant", "content": ADDS}], ADDS, DOUBLE]
    tests = [["assert double(2) == 4"], ["assert double(2) == 4"], SUM, ["assert f(1)"], None]
    assert code_reward(completions, tests=tests) == [1.0, 0.0, 1.0, 0.0, None]
    half = [*SUM, {"stdin": "1 1", "stdout": "3"}, {"stdin": "1 1", "stdout": "4"}]
    assert code_reward([ADDS], tests=[half], partial_credit=True) == [0.5]


def test_the_options_of_the_reward_are_those_of_the_judging():
    judge_with = partial(code_reward, tests=[SUM])
    recorder = Recorder()
    assert judge_with([ADDS], executor=recorder) == [1.0]
    assert len(recorder.sent) == len(SUM)
    assert judge_with([f"so</think>{ADDS}"], prefilled_think=True) == [1.0]
    assert judge_with([ADDS], prefilled_think=True) == [0.0]
    slow = "import time\ntime.sleep(1)\n" + ADDS
    assert judge_with([slow], limits=Limits(wall_seconds=0.3)) == [0.0]


def test_completions_of_a_batch_run_at_the_same_time():
    if shared_sandbox()._num_workers < 2:
        pytest.skip("one processor")
    both_run = threading.Barrier(2)

    class WaitsForTheOther(Recorder):
        def run(self, code, **options):
            both_run.wait(timeout=60)
            return super().run(code, **options)

    tests = [[{"stdin": "", "stdout": "1"}]] * 2
    assert code_reward(["print(1)"] * 2, tests=tests, executor=WaitsForTheOther()) == [1.0, 1.0]


def test_the_reward_runs_in_a_worker_of_ours_as_in_this_process():
    rewards = {"correct": (code_reward, 1.0)}
    check_rewards(rewards, ["tests"])
    with pytest.raises(ConfigError, match="tests"):
        check_rewards(rewards, ["test"])
    columns = {"tests": [SUM, SUM]}
    for num_workers in (0, 1):
        call = {"prompts": ["p", "p"], "completion_ids": [[1], [2]], "columns": columns}
        scoring = Scoring(num_workers=num_workers)
        scores = score(rewards, [ADDS, "print(3)"], **call, scoring=scoring)
        assert scores.totals == [1.0, 0.0]


def test_rows_whose_tests_are_broken_are_known_before_training():
    rewards = {"correct": (partial(code_reward, partial_credit=True), 1.0)}
    found = find_unscorable(rewards, {"tests": [SUM, ["assert f(1) =="], []]})
    assert list(found) == [1, 2]
    assert found[1].startswith("correct: test 1: it cannot be compiled")


def test_a_machine_without_isolation_is_known_before_training_unless_another_executor_is_used(
    monkeypatch,
):
    class NoSandbox:
        def describe(self):
            raise SandboxUnavailableError("no isolation works")

    monkeypatch.setattr("posttrain.rewards.code.shared_sandbox", NoSandbox)
    with pytest.raises(SandboxUnavailableError, match="no isolation works"):
        find_unscorable({"correct": (code_reward, 1.0)}, {"tests": [SUM]})
    assert code_reward.find_unscorable([SUM], executor=Recorder()) == []
