"""Which part of a completion is the program."""

import pytest

from posttrain.programs.extraction import MAX_CODE_CHARS, complete_function
from posttrain.rewards.code import find_program
from tests.deadline import deadline

FENCED = "Here it is:\n```python\nprint(1)\n```\nDone."


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("print(1)\n", "print(1)\n"),
        (FENCED, "print(1)\n"),
        ("```py\nprint(1)\n```", "print(1)\n"),
        ("```Python3 \nprint(1)\n```  ", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```python\nfirst\n```\nbetter:\n```python\nsecond\n```", "second\n"),
        ("```python\ncode\n```\nIt prints:\n```\n42\n```", "code\n"),
        ("```python\ncode\n```\nRun it:\n```bash\npython x.py\n```", "code\n"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("  ```python\nprint(1)\n\n  ```", "print(1)\n\n"),
        ("<think>```python\nwrong\n```</think>```python\nright\n```", "right\n"),
        ("<think>no idea</think><answer>print(1)</answer>", "print(1)"),
        ("<answer>\n```python\nright\n```\n</answer>```python\nafter\n```", "right\n"),
        ("a <answer>one</answer> b <answer>two</answer>", "two"),
        ("```python\r\nprint(1)\r\n```", "print(1)\r\n"),
    ],
)
def test_the_program_is_what_the_completion_commits_itself_to(completion, code):
    assert find_program(completion) == (code, "")


@pytest.mark.parametrize(
    ("completion", "problem"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("```python\n\n```", "empty"),
        ("```json\n{}\n```", "empty"),
        ("<think>done</think>", "empty"),
        ("<think>```python\nprint(1)\n```", "<think> is not closed"),
        ("<answer>print(1)", "<answer> is not closed"),
        ("print(1)</answer>", "<answer> is not closed, or not opened"),
        ("```python\nprint(1)\n", "fence is not closed"),
        (FENCED + "\n```python\nprint(", "fence is not closed"),
        ("x" * (MAX_CODE_CHARS + 1), "over 100000 characters"),
    ],
)
def test_what_was_not_finished_or_is_no_program_is_none(completion, problem):
    found = find_program(completion)
    assert found.code == ""
    assert problem in found.problem


def test_a_template_that_ends_in_think_leaves_the_completion_inside_the_thought():
    assert find_program("print(1)", prefilled_think=True).problem == "<think> is not closed"
    assert find_program("so</think>print(1)", prefilled_think=True).code == "print(1)"


def test_long_hostile_texts_never_hang():
    for piece in ["```", "```python\n", "<think>", "<answer>", "</answer>", "`", "\n"]:
        with deadline(30, piece):
            find_program(piece * 200_000)


HEAD = 'def add(a, b):\n    """Add."""\n'


@pytest.mark.parametrize(
    "code",
    [
        "    return a + b\n",
        "\n    return a + b\n",
        "return a + b",
        "total = a + b\nreturn total",
        "def add(a, b):\n    return a + b\n",
        "def plus(a, b):\n    return a + b\n\nadd = plus\n",
        "import operator\nfrom operator import add\nadd = add\n",
        "from __future__ import annotations\ndef add(a: int, b: int):\n    return a + b\n",
    ],
)
def test_a_body_and_a_whole_function_both_complete_the_head(code):
    namespace = {}
    exec(complete_function(HEAD, "add", code), namespace)
    assert namespace["add"](2, 3) == 5


def test_what_stands_beside_the_head_can_be_used_by_a_whole_function():
    head = "import math\n\ndef half_up(x):\n    'Round.'\n"
    namespace = {}
    code = "def half_up(x):\n    return math.floor(x + 0.5)\n"
    exec(complete_function(head, "half_up", code), namespace)
    assert namespace["half_up"](2.5) == 3
