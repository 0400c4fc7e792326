"""Sessions: calls, evaluation, and code that tries to spoil them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from posttrain.sandbox import Limits

BRIEF = Limits(wall_seconds=0.4)


def test_functions_are_called_with_plain_data(any_sandbox):
    with any_sandbox.open("def both(a, *, b): return [(a, b)]") as session:
        value = session.call("both", [{1: "x"}], {"b": 2.0})
        assert (value.status, value.data) == ("ok", [({1: "x"}, 2.0)])


def test_expressions_are_evaluated_in_the_module(sandbox):
    with sandbox.open("import math\nx = 5") as session:
        assert session.evaluate("math.floor(x / 2)").data == 2
        assert session.evaluate("{x, True}").data == {5, True}


def test_a_session_keeps_its_state_and_shares_none(sandbox):
    code = "seen = []\ndef add(x):\n    seen.append(x)\n    return seen"
    with sandbox.open(code) as one, sandbox.open(code) as other:
        one.call("add", [1])
        assert one.call("add", [2]).data == [1, 2]
        assert other.call("add", [3]).data == [3]


@pytest.mark.parametrize(
    ("expression", "detail"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("missing", "NameError: name 'missing' is not defined"),
        ("object()", "WireError: not plain data: object"),
        ("(i for i in [])", "WireError: not plain data: generator"),
        ("bytearray(9_000_000)", "WireError: not plain data: bytearray"),
        ("'x' * 9_000_000", "WireError: more than 4194304 bytes of data"),
        ("exit(3)", "SystemExit: 3"),
        ("(", "SyntaxError:"),
        ("Loud()", "Loud: (no text)"),
        ("f()", "RecursionError:"),
    ],
)
def test_what_goes_wrong_is_an_error_in_one_line_and_the_session_lives(sandbox, expression, detail):
    code = (
        "from sys import exit\ndef f(): return f()\nclass Mute(Exception):\n"
        "    def __str__(self): raise ValueError\n"
        "def Loud(): raise type('Loud', (Mute,), {})()"
    )
    with sandbox.open(code) as session:
        value = session.evaluate(expression)
        assert value.status == "error"
        assert value.detail.startswith(detail)
        assert session.evaluate("1 + 1").data == 2


def test_an_unknown_function_is_an_error(sandbox):
    with sandbox.open("") as session:
        assert session.call("f").detail == "KeyError: 'f'"


def test_code_that_fails_says_so_at_every_call(sandbox):
    with sandbox.open("x = 1\nraise ValueError('no')") as session:
        for value in [session.evaluate("x"), session.call("f")]:
            assert (value.status, value.detail) == ("error", "ValueError: no")


def test_a_main_block_does_not_run(sandbox):
    with sandbox.open("x = 1\nif __name__ == '__main__': x = 2") as session:
        assert session.evaluate("x, __name__").data == (1, "solution")


def test_a_dataclass_of_the_module_can_be_used(sandbox):
    code = (
        "from dataclasses import dataclass, astuple\n"
        "@dataclass\nclass Point:\n    x: int\n    y: 'int'"
    )
    with sandbox.open(code) as session:
        assert session.evaluate("astuple(Point(1, 2))").data == (1, 2)


def test_printing_and_reading_do_not_disturb_the_answers(sandbox):
    code = (
        "import sys\nprint('x' * 1_000_000)\ndef f():\n    print('y' * 1_000_000)\n"
        "    sys.stderr.write('z')\n    return sys.stdin.read()"
    )
    with sandbox.open(code) as session:
        assert session.call("f").data == ""


@pytest.mark.parametrize(
    ("expression", "status"),
    [
        ("os._exit(0)", "error"),
        ("os._exit(3)", "error"),
        ("os.abort()", "killed"),
        ("ctypes.string_at(0)", "killed"),
        ("os.kill(os.getpid(), 9)", "killed"),
        ("os.closerange(0, 100)", "error"),
        ("os.close(3)", "error"),
        ("bytearray(1 << 40)", "memory"),
        ("time.sleep(60)", "timeout"),
        ("[].sort(key=lambda: 0) or [0 for _ in iter(int, 1)]", "timeout"),
    ],
)
def test_a_session_that_ends_says_how_and_stays_over(sandbox, expression, status):
    with sandbox.open("import os, ctypes, time", limits=BRIEF) as session:
        assert session.evaluate("1").data == 1
        assert session.evaluate(expression).status == status
        after = session.evaluate("1")
        assert (after.status, after.data) == (status, None)
    assert sandbox.run("print(1)").stdout == "1\n"


@pytest.mark.parametrize(
    "written",
    [
        "b'garbage' * 10",
        "b'\\xff\\xff\\xff\\xff'",
        "b'\\0\\0\\0\\x02{}'",
        "b'\\0\\0\\0\\x04null'",
        "b'\\0\\0\\0\\x0e{\"t\":[1, 2, 3]}'",
        'b\'\\0\\0\\0\\x13{"t":["raised", [1]]}\'',
        "b'\\0\\0\\0\\x02[['",
    ],
)
def test_garbage_on_the_channel_is_an_error_and_no_exception(sandbox, written):
    with sandbox.open("import os", limits=BRIEF) as session:
        value = session.evaluate(f"[os.write(3, {written}), os._exit(0)]")
        assert value.status == "error"
        assert value.data is None


def test_a_flood_on_the_channel_harms_only_the_session(sandbox):
    code = "import os\ndef flood():\n    while True: os.write(3, b'\\0\\0\\0\\x04true' * 1000)"
    with sandbox.open(code, limits=BRIEF) as session:
        values = [session.call("flood") for _ in range(20)]
        assert all(value.status == "error" and value.data is None for value in values)
    assert sandbox.run("print(1)").stdout == "1\n"


def test_arguments_that_are_no_plain_data_are_our_failure_and_the_session_lives(sandbox):
    with sandbox.open("def f(x): return x") as session:
        assert session.call("f", [object()]).status == "failed"
        assert session.call("f", [1]).data == 1


def test_the_wall_limit_is_for_the_whole_session(sandbox):
    with sandbox.open("import time", limits=BRIEF) as session:
        statuses = [session.evaluate("time.sleep(0.15)").status for _ in range(6)]
    assert statuses[0] == "ok"
    assert statuses[-1] == "timeout"


def test_a_session_that_is_not_asked_can_be_closed(sandbox):
    for code in ["", "while True: pass", "import os; os._exit(0)", "("]:
        sandbox.open(code).close()
    assert sandbox.run("print(1)").stdout == "1\n"


def test_a_closed_session_cannot_be_used(sandbox):
    session = sandbox.open("")
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.evaluate("1")


def test_one_thread_may_hold_more_sessions_than_there_are_workers(sandbox):
    def nest(depth):
        with sandbox.open(f"depth = {depth}") as session:
            deeper = nest(depth - 1) if depth else 0
            return session.evaluate("depth").data + deeper

    with ThreadPoolExecutor(3) as pool:  # of two workers, each wants three
        assert list(pool.map(nest, [2] * 3)) == [3] * 3


def test_a_session_in_a_host_call_does_not_wait_for_itself(sandbox):
    with sandbox.open("def double(x): return 2 * x") as session:
        result = sandbox.run(
            "print(host_call(21))", host_call=lambda data: session.call("double", [data]).data
        )
    assert result.stdout == "42\n"
