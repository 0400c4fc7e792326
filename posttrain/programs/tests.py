"""Reading the data's column `tests`: for each problem a list of tests, as plain JSON.

    "assert add(1, 2) == 3"                        any test code that asserts
    {"assert": "…", "setup": "import math"}        the same, with what it needs
    {"stdin": "1 2\\n", "stdout": "3\\n"}            a whole program
    {"check": "def check(candidate): …", "entry_point": "add", "prompt": "def add(a, b):\\n …"}

The last form is HumanEval's: `prompt` is the head of the function, which the completion may leave
out. A key that holds None counts as absent, because parquet files fill missing keys with None.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from posttrain.programs.splitting import SourceTest, read_source

# The keys of each form of test: required and optional ones.
FORMS = (
    ({"stdin", "stdout"}, set()),
    ({"assert"}, {"setup"}),
    ({"check", "entry_point"}, {"prompt"}),
)
Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"


class ProgramTest(NamedTuple):
    """A test of a whole program: the output that it has to write for an input."""

    stdin: str
    stdout: str

    def problem_with(self, output: str) -> str:
        """Return how the output differs, or "". Trailing spaces and final blank lines are free."""
        found, wanted = visible_lines(output), visible_lines(self.stdout)
        for number, (line, right) in enumerate(zip(found, wanted, strict=False), start=1):
            if line != right:
                return f"wrong output in line {number}"
        if len(found) != len(wanted):
            return f"{len(found)} lines of output instead of {len(wanted)}"
        return ""


class CodeTests(NamedTuple):
    """The tests of one problem.

    Attributes:
        programs: Tests of a whole program.
        sources: Tests that are code.
        prompt: The head of the function `entry_point`, if the data gives it.
        entry_point: The name of the function that a `check` is about.
        problem: The reason why these tests cannot be used; otherwise "".
    """

    programs: tuple[ProgramTest, ...] = ()
    sources: tuple[SourceTest, ...] = ()
    prompt: str = ""
    entry_point: str = ""
    problem: str = ""

    @property
    def num_tests(self) -> int:
        """Number of tests of both kinds."""
        return len(self.programs) + len(self.sources)


def visible_lines(text: str) -> list[str]:
    """Split a text into lines without trailing white space, up to the last that is not blank."""
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_tests(tests: Json) -> CodeTests:
    """Read one entry of the column. If it cannot be used, `problem` says why."""
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


def check_tests(tests: Json) -> str:
    """Return why these tests cannot judge a program, or "". For checks when data is loaded."""
    return read_tests(tests).problem


def find_broken(tests: Iterable[Json]) -> list[tuple[int, str]]:
    """List the rows of a whole column that `check_tests` refuses: (row, reason)."""
    checked = ((row, check_tests(each)) for row, each in enumerate(tests))
    return [(row, problem) for row, problem in checked if problem]


def _shape_problem(entry: Json) -> str:
    if not isinstance(entry, dict):
        return f"expected text or an object, found {type(entry).__name__}"
    keys = {key for key, value in entry.items() if value is not None}
    if not any(needed <= keys <= needed | optional for needed, optional in FORMS):
        forms = "; ".join(" + ".join(sorted(needed)) for needed, _ in FORMS)
        return f"its keys are {', '.join(sorted(keys)) or 'none'}; expected {forms}"
    texts = [key for key in sorted(keys) if not isinstance(entry[key], str)]
    return f"{texts[0]!r} is {type(entry[texts[0]]).__name__}, not text" if texts else ""


def _read_source(entry: dict[str, Json]) -> SourceTest:
    if entry.get("check") is None:
        return read_source(entry["assert"], entry.get("setup") or "")
    name = entry["entry_point"]
    if not name.isidentifier():
        return SourceTest(problem=f"entry_point is {name!r}, not the name of a function")
    head = _whole(entry.get("prompt") or "")
    return read_source(f"{entry['check']}\ncheck({name})\n", head, name)


def _whole(prompt: str) -> str:
    """Make the head of a function code that runs: one without a docstring gets a body."""
    try:
        ast.parse(prompt)
    except SyntaxError:
        return f"{prompt}\n    pass\n"
    return prompt
