"""Tests as data: what is read from them, and what is refused."""

import pytest

from posttrain.programs.tests import ProgramTest, check_tests, find_broken, read_tests


def test_an_entry_point_is_the_solutions_although_the_head_binds_it():
    check = "def check(candidate):\n    assert candidate(1) == helper(2)\n"
    head = "def helper(x):\n    return x\n\ndef f(x):\n    'Doc.'\n"
    (test,) = read_tests([{"check": check, "entry_point": "f", "prompt": head}]).sources
    assert (test.names, test.entry_point) == (("f",), "f")


@pytest.mark.parametrize(
    ("tests", "problem"),
    [
        (None, "expected a list of tests, found NoneType"),
        ("assert f(1)", "found str"),
        ([], "an empty list"),
        ([3], "test 1: expected text or an object, found int"),
        (["assert f(1) == 1", "assert f(1) =="], "test 2: it cannot be compiled (invalid syntax"),
        (["f(1)"], "it asserts nothing"),
        (["assert 1 + 1 == 2"], "it calls nothing of the solution"),
        (["assert len([1]) == 1"], "it calls nothing of the solution"),
        ([{"stdin": "1"}], "test 1: its keys are stdin; expected stdin + stdout"),
        ([{"stdin": "1", "stdout": 2}], "'stdout' is int, not text"),
        ([{"stdin": "1", "stdout": "2", "output": "2"}], "its keys are output, stdin, stdout"),
        ([{"assert": "assert f(1)", "stdin": ""}], "its keys are assert, stdin"),
        ([{}], "its keys are none"),
        (
            [{"check": "def check(c):\n    assert c(1)", "entry_point": "f(1)"}],
            "entry_point is 'f(1)'",
        ),
        ([{"assert": "assert f(1)", "setup": "if"}], "it cannot be compiled"),
        (["assert " + "(" * 300 + "f(1)" + ")" * 300], "it cannot be compiled"),
    ],
)
def test_broken_tests_are_found_when_data_loads(tests, problem):
    assert problem in check_tests(tests)


def test_rows_with_broken_tests_are_named():
    assert find_broken([["assert f(1)"], [], None]) == [
        (1, "expected a list of tests, found an empty list"),
        (2, "expected a list of tests, found NoneType"),
    ]


def test_keys_that_hold_none_are_absent():
    entry = {"stdin": "1", "stdout": "2", "assert": None, "setup": None, "prompt": None}
    assert read_tests([entry]).programs == (ProgramTest("1", "2"),)


@pytest.mark.parametrize("output", ["1 2\n3\n", "1 2\n3", "1 2  \r\n3\t\r\n\n\n"])
def test_output_may_differ_in_line_ends_trailing_space_and_blank_lines_at_the_end(output):
    assert ProgramTest("", "1 2\n3\n").problem_with(output) == ""


@pytest.mark.parametrize(
    "output",
    ["", "1 2", "1 2\n3\n4", "1  2\n3", " 1 2\n3", "1 2\n\n3", "\n1 2\n3", "1 2\n3.0", "1 2 3"],
)
def test_any_other_difference_of_output_is_wrong(output):
    assert ProgramTest("", "1 2\n3\n").problem_with(output)
