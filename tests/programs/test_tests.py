"""Tests as data: what is read from them, what is asked of the solution, what is refused."""

import pytest

from posttrain.programs.splitting import Comparison, read_source
from posttrain.programs.tests import ProgramTest, check_tests, find_broken, read_tests


@pytest.mark.parametrize(
    ("source", "comparison"),
    [
        ("assert f(1, [2]) == {'a': (3,)}", ("f(1, [2])", "==", {"a": (3,)})),
        ("assert -3 == f(1)", ("f(1)", "==", -3)),
        ("assert f('x') != b'y'", ("f('x')", "!=", b"y")),
        ("assert f(1) is None", ("f(1)", "is", None)),
        ("assert f(1) is not True", ("f(1)", "is not", True)),
        ("assert f(1)", ("not not f(1)", "==", True)),
        ("assert not f(1)", ("not not f(1)", "==", False)),
        ("assert f(g(1), key=lambda x: -x) == 2", ("f(g(1), key=lambda x: -x)", "==", 2)),
        ("assert f(sorted([2, 1])) == 2, 'message'", ("f(sorted([2, 1]))", "==", 2)),
        ("assert Solution().solve(1) == 2", ("Solution().solve(1)", "==", 2)),
    ],
)
def test_a_call_compared_with_a_literal_is_split_into_the_two(source, comparison):
    assert read_source(source).comparisons == (Comparison(*comparison),)


@pytest.mark.parametrize(
    "source",
    [
        "assert sorted(f(1)) == [1]",
        "assert abs(f(1) - 2) < 1e-6",
        "assert f(1) == f(2)",
        "assert f(1) == 2 == 3",
        "assert f(1) in (2, 3)",
        "assert f(1) is 1000",
        "assert f(1) == 1 + 1",
        "assert f(1).startswith('a')",
        "assert f(1)[0] == 2",
        "x = f(1)\nassert x == 2",
        "for i in range(3):\n    assert f(i) == i",
        "assert f(1) == 2\nprint(f(2))",
    ],
)
def test_anything_else_is_left_to_the_judge(source):
    test = read_source(source)
    assert (test.problem, test.comparisons) == ("", ())


def test_a_setup_is_left_to_the_judge_even_with_a_simple_assert():
    assert read_source("assert f(1) == 2", "f = len").comparisons == ()


@pytest.mark.parametrize(
    ("source", "marked"),
    [
        ("assert sorted(f(1)) == [1]", "assert sorted(_inside('f(1)')) == [1]"),
        ("assert set(f(lambda x: x)) == {1}", "assert set(_inside('f(lambda x: x)')) == {1}"),
        ("assert f(1).real == 2 - 0", "assert _inside('f(1)').real == 2 - 0"),
        ("x = 1\nassert f(x) == 2", "x = 1\nassert f(x) == 2"),
        ("assert all(f(x) for x in (1, 2))", "assert all((f(x) for x in (1, 2)))"),
        ("assert f(math.pi) > 3", "assert f(math.pi) > 3"),
        ("s = Stack()\nassert s.pop() == 1", "s = Stack()\nassert s.pop() == 1"),
        ("def f(x):\n    return g(2)\nassert f(1) == 2",
         "def f(x):\n    return _inside('g(2)')\nassert f(1) == 2"),
    ],
)  # fmt: skip
def test_only_calls_that_depend_on_nothing_of_the_test_are_sent_as_text(source, marked):
    assert read_source(source).source == marked


def test_the_solution_provides_the_names_that_the_test_neither_binds_nor_finds_in_python():
    source = "from math import isclose\nfor n in range(3):\n    assert isclose(f(n), g(n) + len(h))"
    test = read_source(source)
    assert test.names == ("f", "g", "h")


def test_a_module_of_the_standard_library_needs_no_import_where_only_its_attributes_are_used():
    test = read_source("assert math.isclose(f(1), string(2))")
    assert (test.modules, test.names) == (("math",), ("f", "string"))


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
