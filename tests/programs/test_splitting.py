"""Test code taken apart: what is asked of the solution, and what is left to the judge."""

import pytest

from posttrain.programs.splitting import Comparison, read_source


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
        (
            "def f(x):\n    return g(2)\nassert f(1) == 2",
            "def f(x):\n    return _inside('g(2)')\nassert f(1) == 2",
        ),
    ],
)
def test_only_calls_that_depend_on_nothing_of_the_test_are_sent_as_text(source, marked):
    assert read_source(source).source == marked


def test_the_solution_provides_the_names_that_the_test_neither_binds_nor_finds_in_python():
    source = "from math import isclose\nfor n in range(3):\n    assert isclose(f(n), g(n) + len(h))"
    test = read_source(source)
    assert test.names == ("f", "g", "h")


def test_a_module_of_the_standard_library_needs_no_import_where_only_its_attributes_are_used():
    test = read_source("assert math.isclose(f(1), string(2))")
    assert (test.modules, test.names) == (("math",), ("f", "string"))
