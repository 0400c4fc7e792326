"""Programs judged by their tests, in the sandbox of this machine."""

import pytest

from posttrain.rewards.code import judge_code, shared_sandbox
from posttrain.sandbox import Limits

QUICK = Limits(wall_seconds=2.0, cpu_seconds=1.0)
BRIEF = Limits(wall_seconds=0.3, cpu_seconds=1.0)  # for programs that never end
DOUBLE = "def double(x):\n    return 2 * x\n"
SUM = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5\n", "stdout": "10\n"}]
ADDS = "print(sum(map(int, input().split())))"


def judge(code, tests, *, limits=QUICK, **options):
    return judge_code(code, tests, shared_sandbox(), limits=limits, **options)


@pytest.mark.parametrize(
    "test",
    [
        "assert double(2) == 4",
        "assert 4 == double(2)",
        "assert double(2) == 4.0 and double(1) == True + 1",
        "assert double(2) != 5",
        "assert double(2)",
        "assert not double(0)",
        "assert double(2) == double(double(1))",
        "assert sorted([double(2), double(1)]) == [2, 4]",
        "assert abs(double(0.1) - 0.2) < 1e-9",
        "assert math.isclose(double(0.1), 0.2)",
        "assert double([1]) == [1, 1] and double((1,)) == (1, 1)",
        "assert double(b'x') == b'xx'",
        "assert str(double(float('nan'))) == 'nan'",
        "assert double(10 ** 30) == 2 * 10 ** 30",
        "x = 3\nassert double(x) == 6",
        "assert double(x := 3) == 2 * x",
        "for n in range(5):\n    assert double(n) == n + n",
        "assert all(double(n) % 2 == 0 for n in range(5))",
        "from operator import add\nassert double(4) == add(4, 4)",
        "try:\n    double({})\nexcept TypeError:\n    pass\nelse:\n    raise AssertionError",
        "def check(f):\n    assert f(x=1) == 2\ncheck(double)",
        {"assert": "assert isclose(double(0.1), 0.2)", "setup": "from math import *"},
        {"assert": "assert double(*numbers) == 6", "setup": "numbers = [3]"},
    ],
)
def test_a_right_function_passes_any_form_of_assert_and_a_wrong_one_fails_it(test):
    assert judge(DOUBLE, [test]).score == 1.0
    wrong = "def double(x):\n    return -7 if x else -8\n"
    assert judge(wrong, [test, "assert double(1) == 2"]).score == 0.0


@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("def f(g, x):\n    return g(x)", "assert [f(lambda x: x + 1, 1)] == [2]"),
        ("class Solution:\n    def f(self, x):\n        return x", "assert Solution().f(2) == 2"),
        ("def Split(x):\n    return x.split()", "assert set(Split('a b')) == {'a', 'b'}"),
        ("import re\ndef f(x):\n    return re.match('a', x)", "assert f('a')"),
        ("import re\ndef f(x):\n    return re.match('a', x)", "assert not f('b')"),
        (
            "def f():\n    return {(1, 'a'): {2}, None: frozenset([3])}",
            "assert f() == {(1, 'a'): {2}, None: frozenset([3])}",
        ),
        ("def f(x):\n    print('noise')\n    return x", "assert f(1) == 1"),
        ("def f(x):\n    return x\nif __name__ == '__main__':\n    f(input())", "assert f(1) == 1"),
    ],
)
def test_functions_classes_and_methods_can_be_asked_for(code, test):
    assert judge(code, [test]).score == 1.0


STACK = """
class Stack:
    def __init__(self):
        self.items = []
    def push(self, item):
        self.items.append(item)
    def pop(self):
        return self.items.pop()
    def __len__(self):
        return len(self.items)
    def __contains__(self, item):
        return item in self.items
class Node:
    def __init__(self, value):
        self.value, self.left, self.right = value, None, None
def height(node):
    return 1 + max(height(node.left), height(node.right)) if node else 0
def values(nodes):
    return [node.value for node in nodes]
"""


def test_objects_stay_with_the_solution_and_keep_their_state():
    test = """
a, b = Stack(), Stack()
a.push(1)
a.push([2])
b.push(3)
assert a.pop() == [2] and len(a) == 1 and 1 in a and 3 not in a
assert a.items == [1] and b.items == [3]
assert hasattr(a, "items") and not hasattr(a, "size")
try:
    a.pop(), a.pop()
    assert False
except IndexError:
    pass
"""
    assert judge(STACK, [test]).score == 1.0
    assert (
        judge(STACK.replace("self.items = []", "self.items = ITEMS\nITEMS = []"), [test]).score == 0
    )
    # Attributes can be set, and objects handed back, alone or in a list.
    setup = "root = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(3)"
    tests = [
        {"assert": "assert height(root) == 3", "setup": setup},
        {"assert": "assert values([root, root.left]) == [1, 2]", "setup": setup},
    ]
    assert judge(STACK, tests).score == 1.0


@pytest.mark.parametrize(
    "result",
    [
        "type('Number', (int,), {})(4)",
        "type('Text', (str,), {})('aa')",
        "type('Any', (), {'__eq__': lambda *_: True})()",
        "__import__('collections').deque([1])",
        "__import__('collections').namedtuple('Pair', 'a b')(1, 2)",
        "range(3)",
        "(n for n in (1, 2))",
        "double",
        "[object()]",
    ],
)
def test_equality_is_between_builtin_types_only(result):
    code = f"def double(x):\n    return {result}\n"
    for test in ("assert double(1) == 4", "x = 1\nassert double(x) == 4", "assert double(1) != 9"):
        assert judge(code, [test]).score == 0.0


def test_a_test_that_asks_nothing_of_the_solution_passes_nobody():
    verdict = judge(DOUBLE, ["for x in []:\n    assert double(x) == 1"])
    assert verdict.score is None
    assert verdict.reason == "tests cannot be used: passed, before it asks the solution anything"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print('3')", "wrong output in line 1"),
        (ADDS + "\nraise ValueError('late')", "error, ValueError: late"),
        (ADDS + "\nimport sys\nsys.exit(3)", "error, exit code 3"),
        (ADDS + "\nprint()\nprint('more')", "3 lines of output instead of 1"),
        ("print(", "SyntaxError"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("while True:\n    pass", "timeout"),
        ("print(1 / 0)", "ZeroDivisionError"),
        ("x = bytearray(1 << 40)", "memory"),
        (ADDS + "\nwhile True:\n    print('x' * 1000)", "t"),  # timeout or too much output
        ("print('3\\n' * 999_999)", "too much output"),
    ],
)
def test_a_program_has_to_give_the_right_output_and_end_well(program, reason):
    verdict = judge(program, SUM, limits=BRIEF if "while True" in program else QUICK)
    assert verdict.score == 0.0
    assert reason in verdict.reason


def test_a_right_program_passes_even_if_it_leaves_by_exit():
    assert judge(ADDS, SUM).score == 1.0
    assert judge(ADDS + "\nimport sys\nsys.exit()", SUM).score == 1.0


CRASHES = "import os\ndef f(x):\n    if x == 2:\n        os._exit(0)\n    return x\n"
SIMPLE = [f"assert f({n}) == {n}" for n in range(1, 5)]
JUDGED = [f"assert sorted([f({n})]) == [{n}]" for n in range(1, 5)]


@pytest.mark.parametrize("tests", [SIMPLE, JUDGED])
def test_a_crash_in_one_test_does_not_fail_the_others(tests):
    verdict = judge(CRASHES, tests, partial_credit=True)
    assert (verdict.score, verdict.passed, verdict.total) == (0.75, 3, 4)
    assert judge(CRASHES, tests).score == 0.0


@pytest.mark.parametrize("tests", [SIMPLE, JUDGED])
def test_a_timeout_ends_the_judging(tests):
    """The third and fourth test would pass, and a second hang would take until its own limit."""
    code = "import time\ndef f(x):\n    while x == 2:\n        time.sleep(1)\n    return x\n"
    verdict = judge(code, tests, limits=Limits(wall_seconds=1.0), partial_credit=True)
    assert (verdict.passed, verdict.score) == (1, 0.25)
    assert "longer than" in verdict.reason


def test_a_program_that_ends_itself_again_and_again_is_not_started_for_each_test():
    code = "import os\ndef f(x):\n    if x < 9:\n        os._exit(1)\n    return x\n"
    tests = [f"assert f({n}) == {n}" for n in range(1, 10)]
    assert judge(code, tests, partial_credit=True).passed == 0
    assert judge(code, tests[-2:], partial_credit=True).passed == 1


def test_partial_credit_counts_tests_of_all_kinds_and_the_default_wants_all():
    code = DOUBLE + "if __name__ == '__main__':\n    print(input())"
    tests = [
        "assert double(1) == 2",
        "assert double(1) == 3",
        "assert sorted([double(1)]) == [2]",
        "assert sorted([double(1)]) == [3]",
        {"stdin": "a", "stdout": "a"},
        {"stdin": "a", "stdout": "b"},
    ]
    assert judge(code, tests, partial_credit=True)[2:] == (3, 6)
    assert judge(code, tests[::2]).score == 1.0
    assert judge(code, tests).score == 0.0


HUMAN_EVAL = {
    "prompt": 'def half(x: float) -> float:\n    """Half of x."""\n',
    "entry_point": "half",
    "check": "def check(candidate):\n    assert candidate(4) == 2\n    assert half(3) == 1.5\n",
}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("    return x / 2\n", 1.0),
        ("```python\ndef half(x):\n    return x / 2\n```", 1.0),
        ("    return x // 2\n", 0.0),
        ("    pass\n", 0.0),
        ("def check(candidate):\n    pass\n", 0.0),
        ("    return x / 2\n\ndef check(candidate):\n    candidate(0)\n", 1.0),
        ("I would divide by two.", 0.0),
    ],
)
def test_human_eval_takes_a_body_or_a_whole_function(completion, expected):
    assert judge(completion, [HUMAN_EVAL]).score == expected


def test_other_tests_beside_a_check_judge_the_completed_function_too():
    tests = [HUMAN_EVAL, "assert half(8) == 4"]
    assert judge("    return x / 2\n", tests).score == 1.0
    assert judge("    return x / 2 if x < 8 else 0\n", tests).score == 0.0


def test_a_head_without_a_docstring_is_a_head_too():
    test = {**HUMAN_EVAL, "prompt": "def half(x):\n"}
    assert judge("    return x / 2\n", [test]).score == 1.0
    assert judge("    return x\n", [test]).score == 0.0


def test_what_the_head_defines_beside_the_function_is_the_tests_own():
    """A solution that replaces the helper by which it is checked gains nothing."""
    test = {
        "prompt": "def square(x):\n    return x * x\n\ndef root(x):\n    'A root of x.'\n",
        "entry_point": "root",
        "check": "def check(candidate):\n    assert square(candidate(9)) == 9\n",
    }
    assert judge("    return 3 * square(1)\n", [test]).score == 1.0
    cheat = "def square(x):\n    return 9\ndef root(x):\n    return 1\n"
    assert judge(cheat, [test]).score == 0.0


@pytest.mark.parametrize(
    "test",
    [
        "import sys\nsys.exit(0)\nassert double(1) == 2",
        "import os\nos._exit(0)\nassert double(1) == 2",
        "import nothing_of_that_name\nassert double(1) == 2",
        "assert double(1) == 2\nraise SystemExit",
        "from decimal import Decimal\nassert double(Decimal(1)) == 2",
        "f = lambda x: x\nassert double(f) == 2",
    ],
)
def test_tests_that_cannot_be_run_give_no_score(test):
    verdict = judge(DOUBLE, [test])
    assert verdict.score is None
    assert verdict.reason.startswith("tests cannot be used: ")


def test_a_broken_test_after_a_good_one_is_still_known_as_broken():
    tests = ["x = 1\nassert double(x) == 2", "import nothing_of_that_name\nassert double(1) == 2"]
    assert judge(DOUBLE, tests).score is None


def test_what_cannot_be_sent_or_raised_as_it_was_is_not_taken_for_the_error_that_a_test_wants():
    expects = "try:\n    f({})\nexcept {}:\n    pass\nelse:\n    raise AssertionError"
    unsendable = "assert f(1) == 1\ng = lambda: 0\n" + expects.format("g", "ValueError")
    assert judge("def f(x):\n    return x\n", [unsendable]).score == 0.0
    fails = "def f(x):\n    return b'\\xff'.decode()\n"
    assert judge(fails, [expects.format("1", "TypeError")]).score == 0.0
    assert judge(fails, [expects.format("1", "RuntimeError")]).score == 1.0


def test_the_judge_waits_as_long_as_the_sessions_of_a_solution_may_take():
    code = (
        "import os, time\ndef f(x):\n    time.sleep(0.9)\n    return [x] if x == 3 else os._exit(0)"
    )
    limits = Limits(wall_seconds=1.8, cpu_seconds=1.0)
    tests = [f"assert sorted(f({n})) == [{n}]" for n in (1, 2, 3)]
    verdict = judge_code(code, tests, shared_sandbox(), limits=limits, partial_credit=True)
    assert verdict.passed == 1


def test_an_answer_too_large_to_be_handed_on_is_wrong_not_unusable():
    """A solution must not be able to make its own tests unusable."""
    code = "def f(x):\n    return 'x' * 3_000_000\n"
    assert judge(code, ["x = f(1)\nassert f([x, x]) == 1"]).score == 0.0


def test_a_test_that_catches_everything_does_not_take_the_end_of_the_solution_for_an_answer():
    tests = ["try:\n    f(1)\nexcept:\n    pass", "try:\n    f(1)\nexcept Exception:\n    pass"]
    tests = [test + "\nassert True" for test in tests]
    for body in ("raise SystemExit", "import os; os._exit(0)", "import os; os.abort()"):
        for test in tests:
            assert judge(f"def f(x):\n    {body}\n", [test]).score == 0.0
    assert judge("def f(x):\n    raise ValueError\n", [tests[1]]).score == 1.0


def test_what_the_solution_returns_can_keep_a_test_busy_only_so_long():
    test = "x = 1\nwhile x != 0:\n    x = f(x)\nassert x == 0"
    verdict = judge("def f(x):\n    return x\n", [test], limits=BRIEF)
    assert verdict.score == 0.0
    assert "timeout" in verdict.reason or "longer" in verdict.reason
