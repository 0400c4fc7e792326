"""Programs: input, output, limits, exit codes, `host_call`."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from posttrain.sandbox import Limits
from tests.deadline import deadline

BRIEF = Limits(wall_seconds=0.4)


def test_a_program_reads_its_input_and_prints(any_sandbox):
    result = any_sandbox.run("print(int(input()) + 1, 'é')", stdin="41\n")
    assert (result.status, result.stdout, result.stderr) == ("ok", "42 é\n", "")
    assert result.exit_code == 0
    assert not result.truncated
    assert 0 < result.wall_seconds < 6


def test_an_uncaught_exception_is_shown_as_python_shows_it(sandbox):
    result = sandbox.run("def half(x):\n    return x / 0\nhalf(1)")
    assert (result.status, result.exit_code) == ("error", 1)
    assert result.detail == "ZeroDivisionError: division by zero"
    assert result.stderr.startswith(
        'Traceback (most recent call last):\n  File "solution.py", line 3, in <module>\n'
    )
    assert "return x / 0" in result.stderr


@pytest.mark.parametrize(("code", "exit_code"), [("0", 0), ("256", 0), ("-1", 255), ("3", 3)])
def test_exit_codes_are_those_of_the_system(sandbox, code, exit_code):
    assert sandbox.run(f"import sys; sys.exit({code})").exit_code == exit_code


def test_a_crash_has_no_exit_code(sandbox):
    result = sandbox.run("import ctypes; ctypes.string_at(0)")
    assert (result.status, result.exit_code) == ("killed", None)
    assert "SIGSEGV" in result.detail


def test_large_input_goes_in_and_out(sandbox):
    text = "0123456789\n" * 60_000
    result = sandbox.run("import sys; sys.stdout.write(sys.stdin.read())", stdin=text)
    assert result.stdout == text
    assert not result.truncated


def test_input_that_nobody_reads_holds_nothing_up(sandbox):
    assert sandbox.run("print(1)", stdin="x" * 1_000_000).stdout == "1\n"
    assert sandbox.run("import os; os.close(0); print(2)", stdin="x" * 1_000_000).stdout == "2\n"


def test_output_beyond_the_cap_is_dropped_and_the_program_runs_on(sandbox):
    code = (
        "import sys\nfor _ in range(40): sys.stdout.write('x' * 100_000)\n"
        "sys.stderr.write('to the end')"
    )
    result = sandbox.run(code, limits=Limits(output_bytes=250_000))
    assert result.status == "ok"
    assert result.stdout == "x" * 250_000
    assert result.stderr == "to the end"
    assert result.truncated


def test_output_of_exactly_the_cap_is_whole(sandbox):
    result = sandbox.run("print('x' * 99)", limits=Limits(output_bytes=100))
    assert (len(result.stdout), result.truncated) == (100, False)


def test_a_flood_ends_at_the_wall_limit(sandbox):
    limits = Limits(wall_seconds=0.2, output_bytes=1 << 16)
    result = sandbox.run("while True: print('x' * 10_000)", limits=limits)
    assert (result.status, len(result.stdout)) == ("timeout", 1 << 16)


def test_both_outputs_can_be_flooded_at_once(sandbox):
    code = (
        "import sys\nfor _ in range(20):\n"
        "    sys.stdout.write('o' * 65536)\n    sys.stderr.write('e' * 65536)"
    )
    result = sandbox.run(code)
    assert (result.status, len(result.stdout), len(result.stderr)) == ("ok", 1 << 20, 1 << 20)


def test_bytes_that_are_no_text_are_replaced(sandbox):
    assert (
        sandbox.run(r"import os; os.write(1, b'a\xff\n')").stdout == "a\N{REPLACEMENT CHARACTER}\n"
    )


def test_output_before_a_timeout_is_kept(sandbox):
    code = "import time\nprint('x', flush=True)\nwhile True: time.sleep(1)"
    result = sandbox.run(code, limits=BRIEF)
    assert (result.status, result.stdout) == ("timeout", "x\n")
    assert result.detail == "longer than 0.4 s"


def test_the_processor_limit_counts_all_threads_and_cannot_be_ignored(best_sandbox):
    code = (
        "import signal, threading\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
        "def burn():\n    while True: pass\n"
        "for _ in range(3): threading.Thread(target=burn).start()"
    )
    result = best_sandbox.run(code, limits=Limits(wall_seconds=60, cpu_seconds=1))
    assert result.status == "timeout"
    assert "processor" in result.detail


def test_sleeping_costs_no_processor_time(sandbox):
    result = sandbox.run("import time; time.sleep(0.3)", limits=Limits(cpu_seconds=1))
    assert result.status == "ok"
    assert result.wall_seconds >= 0.3


def test_memory_is_limited_and_can_be_given(sandbox):
    code = "print(len(bytearray(100 << 20)))"
    assert sandbox.run(code, limits=Limits(memory_bytes=80 << 20)).status == "memory"
    assert sandbox.run(code, limits=Limits(memory_bytes=256 << 20)).status == "ok"


def test_a_thread_bomb_stays_in_its_limits(sandbox):
    code = (
        "import threading, time\nthreading.stack_size(1 << 18)\nstarted = 0\ntry:\n"
        "    while started < 20_000:\n"
        "        threading.Thread(target=time.sleep, args=[60], daemon=True).start()\n"
        "        started += 1\nexcept RuntimeError: print(started < 10_000)"
    )
    result = sandbox.run(code, limits=Limits(wall_seconds=20, memory_bytes=256 << 20))
    assert (result.status, result.stdout) == ("ok", "True\n")


def test_code_that_is_too_long_is_an_error(sandbox):
    assert sandbox.run("#" * (5 << 20)).status == "error"


def test_the_host_is_called_with_plain_data_and_answers_with_it(sandbox):
    asked = []

    def host(data):
        asked.append(data)
        return {"got": data}

    result = sandbox.run("print(host_call((1, b'x')), host_call([]))", host_call=host)
    assert result.stdout == "{'got': (1, b'x')} {'got': []}\n"
    assert asked == [(1, b"x"), []]


def test_what_the_host_raises_is_a_runtime_error_inside(sandbox):
    code = "try: host_call('no')\nexcept RuntimeError as problem: print(problem)"
    assert sandbox.run(code, host_call={}.__getitem__).stdout == "KeyError: 'no'\n"
    result = sandbox.run(code, host_call=lambda _: object())
    assert result.stdout == "WireError: not plain data: object\n"


def test_what_cannot_be_sent_to_the_host_is_an_error_inside(sandbox):
    result = sandbox.run("host_call(object())", host_call=lambda data: data)
    assert (result.status, result.detail) == (
        "error",
        "posttrain.sandbox.wire.WireError: not plain data: object",
    )


def test_there_is_no_host_call_unless_asked_for(sandbox):
    assert sandbox.run("host_call(1)").detail == "NameError: name 'host_call' is not defined"


def test_the_wall_limit_includes_the_host(sandbox):
    result = sandbox.run(
        "host_call(1); print(2)", limits=BRIEF, host_call=lambda _: time.sleep(0.6)
    )
    assert (result.status, result.stdout) == ("timeout", "")


@pytest.mark.parametrize("garbage", ["b'x' * 100", "b'\\xff' * 100", "bytes(4) * 100", "b''"])
def test_garbage_on_the_channel_harms_only_the_run(sandbox, garbage):
    code = f"import os, time\nos.write(3, {garbage})\ntime.sleep(60)"
    result = sandbox.run(code, limits=BRIEF, host_call=lambda data: data)
    assert result.status in ("error", "timeout")
    assert sandbox.run("print(1)").stdout == "1\n"


def test_a_run_inside_a_host_call_needs_no_free_worker(sandbox):
    def host(data):
        return sandbox.run(f"print({data} * 2)").stdout

    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda i: sandbox.run(f"print(host_call({i}))", host_call=host), range(8))
        assert [int(result.stdout) for result in runs] == [2 * i for i in range(8)]


def test_threads_share_a_sandbox(sandbox):
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda i: sandbox.run("print(input())", stdin=str(i)), range(16))
        assert [result.stdout for result in results] == [f"{i}\n" for i in range(16)]


def test_an_interrupt_in_the_host_leaves_the_sandbox_usable(sandbox):
    def host(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sandbox.run("host_call(1)", host_call=host)
    assert threading.active_count() < 50
    assert sandbox.run("print(1)").stdout == "1\n"


def test_subprocesses_work_where_allowed(forking_sandbox):
    code = (
        "import subprocess, sys\n"
        "print(subprocess.run(['ls', '/'], capture_output=True, text=True).returncode)\n"
        "print(subprocess.run([sys.executable, '-c', 'print(7)'], capture_output=True).stdout)"
    )
    assert forking_sandbox.run(code).stdout == "0\nb'7\\n'\n"


def test_a_fork_bomb_stays_in_its_limits(forking_sandbox):
    code = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert forking_sandbox.run(code, limits=BRIEF).status == "timeout"
    assert forking_sandbox.run("print(1)").stdout == "1\n"


def test_what_a_program_leaves_running_ends_with_it(forking_sandbox):
    code = (
        "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n"
        "        time.sleep(60)\n        print('late')\nelse:\n    print('done')"
    )
    with deadline(30):
        result = forking_sandbox.run(code, limits=Limits(wall_seconds=90))
    assert (result.status, result.stdout) == ("ok", "done\n")


def test_orphans_do_not_use_up_the_processes(forking_sandbox):
    code = (
        "import os\nfor _ in range(100):\n    if not os.fork():\n        if not os.fork():\n"
        "            os._exit(0)\n        os._exit(0)\n    assert os.wait()[1] == 0\nprint('done')"
    )
    assert forking_sandbox.run(code).stdout == "done\n"
