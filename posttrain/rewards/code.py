"""The code reward: a completion's program is run against tests in a sandbox, and judged outside.

    rewards = {"correct": (code_reward, 1.0)}                 # the data's column is `tests`
    partial(code_reward, partial_credit=True)                 # the share of tests passed
    judge_code("```python\\nprint(6 * 7)\\n```", [{"stdin": "", "stdout": "42"}], sandbox)

In `posttrain.programs`, `extraction` finds the program, `tests` defines the form of tests, and
`judge` runs them and decides. `posttrain.sandbox` confines the programs. Source: tests as the only
judge of programs are DeepSeek-R1's (arXiv 2501.12948).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from posttrain.programs.extraction import Code, complete_function, extract_code
from posttrain.programs.judge import TEST_LIMITS, Verdict, judge_program
from posttrain.programs.tests import Json, find_broken, read_tests
from posttrain.rewards.pieces import note_rules, per_completion
from posttrain.rewards.text import Completion, final_text, whole_texts
from posttrain.sandbox import Executor, Limits, Sandbox
from posttrain.sandbox.tiers import Description
from posttrain.workers.pool import SIBLINGS_VARIABLE

Tests: TypeAlias = Sequence[str | dict[str, str]]  # see `programs.tests`


def find_program(completion: str, *, prefilled_think: bool = False) -> Code:
    """Find the program that a completion commits itself to: see `final_text`, `extract_code`."""
    final = final_text(completion, prefilled_think=prefilled_think)
    return Code("", final.problem) if final.problem else extract_code(final.text)


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
        completion: The model's text: see `find_program`.
        tests: The tests of the problem: see `programs.tests`.
        executor: Where the program, and test code, runs.
        limits: The limits of a run: see `judge_program`.
        partial_credit: Score the share of tests passed: see `judge_program`.
        prefilled_think: The template ended in `<think>`, so the text starts inside a thought.

    Returns:
        The score, its reason, and the number of tests passed. The score is 0 without a program, and
        None for tests that cannot be read or run, or a sandbox that fails twice.
    """
    found = read_tests(tests)
    if found.problem:
        return Verdict(None, f"tests cannot be used: {found.problem}")
    code, problem = find_program(completion, prefilled_think=prefilled_think)
    if problem:
        return Verdict(0.0, f"no program: {problem}", 0, found.num_tests)
    if found.prompt:
        code = complete_function(found.prompt, found.entry_point, code)
    return judge_program(code, found, executor, limits=limits, partial_credit=partial_credit)


@per_completion
def code_reward(
    completions: Sequence[Completion],
    *,
    tests: Sequence[Tests],
    executor: Executor | None = None,
    limits: Limits = TEST_LIMITS,
    partial_credit: bool = False,
    prompts: Sequence[object] | None = None,
    prefilled_think: bool | None = None,
    **_columns: object,
) -> list[float | None]:
    """Apply `judge_code` to each completion with the data's column `tests`, several at a time.

    By default a completion that passes all its tests scores 1, any other 0. Bind the options with
    `functools.partial`. Without an executor, the process has one `Sandbox` for all calls; if the
    machine has no isolation, SandboxUnavailableError says what to do.
    """
    judge = functools.partial(
        judge_code,
        executor=executor or shared_sandbox(),
        limits=limits,
        partial_credit=partial_credit,
    )
    texts = whole_texts(completions, prompts, prefilled_think=prefilled_think)
    pairs = list(zip(texts, tests, strict=True))
    with ThreadPoolExecutor(max(1, min(len(pairs), _num_workers()))) as threads:
        verdicts = list(threads.map(lambda pair: judge(*pair), pairs))
    note_rules([verdict.reason for verdict in verdicts])
    return [verdict.score for verdict in verdicts]


@functools.cache
def shared_sandbox() -> Sandbox:
    """Return the sandbox of this process, for rewards that are given no executor."""
    return Sandbox(num_workers=_num_workers())


def _num_workers() -> int:
    """Return this worker's share of the cores, next to other ranks and other reward workers."""
    ranks, siblings = (
        int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", SIBLINGS_VARIABLE)
    )
    return max(1, (os.cpu_count() or 1) // (ranks * siblings))


def _find_unscorable(
    tests: Iterable[Json], executor: Executor | None = None
) -> list[tuple[int, str]]:
    """Find the rows whose tests are broken, and check that there is a sandbox if one is needed."""
    if executor is None:
        shared_sandbox().describe()
    return find_broken(tests)


code_reward.find_unscorable = _find_unscorable


def _sandbox_facts() -> dict[str, Description]:
    """Return for the run's metadata the tier, and the result of each canary."""
    return {"sandbox": shared_sandbox().describe()}


code_reward.describe = _sandbox_facts
