"""Is the program of an answer right? Run against tests in a sandbox, judged outside of it.

    rewards = {"correct": (code_reward, 1.0)}                 # the data's column is `tests`
    partial(code_reward, partial_credit=True)                 # the share of tests passed
    judge_code("```python\\nprint(6 * 7)\\n```", [{"stdin": "", "stdout": "42"}], sandbox)

`code_extraction` finds the program, `code_tests` says what tests may look like, `code_judge` has
them run and decides, `posttrain.sandbox` holds what the programs do. Tests as the only judge of
programs: DeepSeek-R1, arXiv 2501.12948.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from posttrain.programs.extraction import complete_function, extract_code
from posttrain.programs.judge import TEST_LIMITS, Verdict, judge_program
from posttrain.programs.tests import find_broken, read_tests
from posttrain.rewards.pieces import per_answer
from posttrain.rewards.text import Completion, completion_text
from posttrain.sandbox import Executor, Limits, Sandbox
from posttrain.workers.pool import SIBLINGS_VARIABLE

Tests = Sequence[str | dict[str, str]]


def judge_code(
    completion: str,
    tests: Tests,
    executor: Executor,
    *,
    limits: Limits = TEST_LIMITS,
    partial_credit: bool = False,
    prefilled_think: bool = False,
) -> Verdict:
    """Judge one completion. Blocks while its program runs; never raises for what that does.

    Args:
        completion: The model's text; `code_extraction` says where its program stands.
        tests: See `code_tests`.
        executor: Where the program, and test code, is run.
        limits, partial_credit: As in `code_judge.judge_program`.
        prefilled_think: The template ended in `<think>`, so the text starts inside it.

    Returns:
        The score, why, and how many tests it passed. No program: 0. Tests that cannot be read or
        run, or a sandbox that fails twice: None.
    """
    found = read_tests(tests)
    if found.problem:
        return Verdict(None, f"tests cannot be used: {found.problem}")
    code, problem = extract_code(completion, prefilled_think=prefilled_think)
    if problem:
        return Verdict(0.0, f"no program: {problem}", 0, found.num_tests)
    if found.prompt:
        code = complete_function(found.prompt, found.entry_point, code)
    return judge_program(code, found, executor, limits=limits, partial_credit=partial_credit)


@per_answer
def code_reward(
    completions: Sequence[Completion],
    *,
    tests: Sequence[Tests],
    executor: Executor | None = None,
    limits: Limits = TEST_LIMITS,
    partial_credit: bool = False,
    prefilled_think: bool = False,
    **_columns: object,
) -> list[float | None]:
    """`judge_code` of each completion against the data's column `tests`, several at a time.

    By default 1 for an answer that passes all its tests, else 0. Bind the options with
    `functools.partial`. Without an executor, the process has one `Sandbox` for all calls, and
    SandboxUnavailableError says what to do where the machine has no isolation.
    """
    judge = functools.partial(
        judge_code,
        executor=executor or shared_sandbox(),
        limits=limits,
        partial_credit=partial_credit,
        prefilled_think=prefilled_think,
    )
    texts = map(completion_text, completions)
    pairs = list(zip(texts, tests, strict=True))
    with ThreadPoolExecutor(max(1, min(len(pairs), _num_workers()))) as threads:
        verdicts = list(threads.map(lambda pair: judge(*pair), pairs))
    return [verdict.score for verdict in verdicts]


@functools.cache
def shared_sandbox() -> Sandbox:
    """The sandbox of this process for rewards that are given none."""
    return Sandbox(num_workers=_num_workers())


def _num_workers() -> int:
    """The cores, shared with this machine's other ranks and with other workers of rewards."""
    ranks, siblings = (
        int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", SIBLINGS_VARIABLE)
    )
    return max(1, (os.cpu_count() or 1) // (ranks * siblings))


def _find_unscorable(
    tests: Iterable[Any], executor: Executor | None = None
) -> list[tuple[int, str]]:
    """Before training: the rows whose tests are broken. SandboxUnavailableError where a sandbox is
    needed and this machine has none."""
    if executor is None:
        shared_sandbox().describe()
    return find_broken(tests)


code_reward.find_unscorable = _find_unscorable


def _sandbox_facts() -> dict[str, Any]:
    """For the run's metadata: the tier, and what each canary found."""
    return {"sandbox": shared_sandbox().describe()}


code_reward.describe = _sandbox_facts
