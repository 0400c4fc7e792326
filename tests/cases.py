"""Tables of test cases as JSONL files, which other projects can use too.

    cases = read_cases(__file__, "math_right")             # tests/…/cases/math_right.jsonl
    letters = read_cases(__file__, "choice", kind="one letter")

A test over a table lists all rows that fail: `assert [c for c in cases if …] == []`.
"""

import json
from pathlib import Path


def read_cases(test_file: str, name: str, *, kind: str | None = None) -> list[dict]:
    """The rows of `cases/NAME.jsonl` beside a test's file; with `kind`, only those rows."""
    with open(Path(test_file).parent / "cases" / f"{name}.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = [row for row in rows if kind in (None, row.get("kind"))]
    assert found, f"no rows of kind {kind!r} in {name}"
    return found
