"""The data's column `tests`: for each problem a list of tests, as plain JSON.

    "assert add(1, 2) == 3"                        any test code that asserts
    {"assert": "…", "setup": "import math"}        the same, with what it needs
    {"stdin": "1 2\\n", "stdout": "3\\n"}            a whole program
    {"check": "def check(candidate): …", "entry_point": "add", "prompt": "def add(a, b):\\n …"}

The last is HumanEval's: `prompt` is the head of the function, which the answer may leave out. Keys
that hold None are as good as absent, as parquet files have it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any, NamedTuple

from posttrain.programs.splitting import SourceTest, read_source

FORMS = (
    ({"stdin", "stdout"}, set()),
    ({"assert"}, {"setup"}),
    ({"check", "entry_point"}, {"prompt"}),
)  # required and optional keys


class ProgramTest(NamedTuple):
    """What a program has to write when it reads this."""

    stdin: str
    stdout: str

    def problem_with(self, output: str) -> str:
        """How the output differs; "" if only in line ends, trailing spaces and blank lines."""
        found, wanted = visible_lines(output), visible_lines(self.stdout)
        for number, (line, right) in enumerate(zip(found, wanted, strict=False), start=1):
            if line != right:
                return f"wrong output in line {number}"
        if len(found) != len(wanted):
            return f"{len(found)} lines of output instead of {len(wanted)}"
        return ""


class CodeTests(NamedTuple):
    """The tests of one problem. `prompt` is the head of the function `entry_point`, if given."""

    programs: tuple[ProgramTest, ...] = ()
    sources: tuple[SourceTest, ...] = ()
    prompt: str = ""
    entry_point: str = ""
    problem: str = ""

    @property
    def num_tests(self) -> int:
        return len(self.programs) + len(self.sources)


def visible_lines(text: str) -> list[str]:
    """Lines without their ends and trailing white space, up to the last that is not blank."""
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_tests(tests: Any) -> CodeTests:
    """One entry of the column. What is wrong with it, if anything, stands in `problem`."""
    if not isinstance(tests, (list, tuple)) or not tests:
        found = "an empty list" if tests in ([], ()) else type(tests).__name__
        return CodeTests(problem=f"expected a list of tests, found {found}")
    programs, sources, prompt, entry_point = [], [], "", ""
    for number, entry in enumerate(tests, start=1):
        entry = {"assert": entry} if isinstance(entry, str) else entry
        problem = _shape_problem(entry)
        if problem:
            return CodeTests(problem=f"test {number}: {problem}")
        if entry.get("stdout") is not None:
            programs.append(ProgramTest(entry["stdin"], entry["stdout"]))
            continue
        source = _read_source(entry)
        if source.problem:
            return CodeTests(problem=f"test {number}: {source.problem}")
        sources.append(source)
        prompt, entry_point = entry.get("prompt") or prompt, source.entry_point or entry_point
    return CodeTests(tuple(programs), tuple(sources), prompt, entry_point)


def check_tests(tests: Any) -> str:
    """Why an answer could not be judged by these tests, or "". For when data is loaded."""
    return read_tests(tests).problem


def find_broken(tests: Iterable[Any]) -> list[tuple[int, str]]:
    """The rows of a whole column that `check_tests` refuses: (row, why)."""
    checked = ((row, check_tests(each)) for row, each in enumerate(tests))
    return [(row, problem) for row, problem in checked if problem]


def _shape_problem(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"expected text or an object, found {type(entry).__name__}"
    keys = {key for key, value in entry.items() if value is not None}
    if not any(needed <= keys <= needed | optional for needed, optional in FORMS):
        forms = "; ".join(" + ".join(sorted(needed)) for needed, _ in FORMS)
        return f"its keys are {', '.join(sorted(keys)) or 'none'}; expected {forms}"
    texts = [key for key in sorted(keys) if not isinstance(entry[key], str)]
    return f"{texts[0]!r} is {type(entry[texts[0]]).__name__}, not text" if texts else ""


def _read_source(entry: dict[str, Any]) -> SourceTest:
    if entry.get("check") is None:
        return read_source(entry["assert"], entry.get("setup") or "")
    name = entry["entry_point"]
    if not name.isidentifier():
        return SourceTest(problem=f"entry_point is {name!r}, not the name of a function")
    head = _whole(entry.get("prompt") or "")
    return read_source(f"{entry['check']}\ncheck({name})\n", head, name)


def _whole(prompt: str) -> str:
    """The head of a function as code that can be run: one without a docstring gets a body."""
    try:
        ast.parse(prompt)
    except SyntaxError:
        return f"{prompt}\n    pass\n"
    return prompt
