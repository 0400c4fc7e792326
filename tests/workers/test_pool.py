"""A pool of killable workers: what it survives, where it works, and that it leaves nothing."""

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest

from posttrain.workers.pool import WorkerPool
from tests.deadline import deadline
from tests.processes import descendants, is_alive, wait_until

TARGET = "tests.workers.worker_targets:answer"


@pytest.fixture(scope="module")
def pool():
    """One pool for all tests: whatever they do to its processes, it goes on."""
    pool = WorkerPool(TARGET, memory_bytes=256 << 20)
    yield pool
    pool.close()


def test_a_call_gives_back_what_the_function_returns(pool):
    assert pool.call(["echo", {"a": [1, None, "ü"]}], timeout_seconds=5).value == {
        "a": [1, None, "ü"]
    }


def test_an_exception_is_reported_and_the_worker_stays(pool):
    first = pool.call(["pid"], timeout_seconds=5).value
    reply = pool.call(["raise", "no such luck"], timeout_seconds=5)
    assert reply == (None, "raised", "ValueError: no such luck")
    assert pool.call(["pid"], timeout_seconds=5).value == first


def test_a_value_that_is_no_json_is_reported_not_unpickled(pool):
    reply = pool.call(["object"], timeout_seconds=5)
    assert reply.problem == "raised"
    assert "not JSON serializable" in reply.detail


def test_a_call_that_hangs_ends_at_its_limit_and_its_process_is_gone(pool):
    pid = pool.call(["pid"], timeout_seconds=5).value
    with deadline(30):
        assert pool.call(["hang"], timeout_seconds=0.3).problem == "timeout"
    assert not is_alive(pid)
    assert pool.call(["echo", 1], timeout_seconds=5).value == 1


def test_the_next_worker_after_a_kill_does_not_wait_for_an_import(pool):
    """It is a fork of the template, which has imported the target and warmed it up once."""
    template, pid = (pool.call([what], timeout_seconds=5).value for what in ("parent", "pid"))
    pool.call(["hang"], timeout_seconds=0.05)
    assert pool.call(["pid"], timeout_seconds=5).value != pid
    assert pool.call(["parent"], timeout_seconds=5).value == template
    assert pool.call(["warm"], timeout_seconds=5).value == [template]


def test_a_first_call_keeps_a_second_when_the_start_took_its_time():
    fresh = WorkerPool(TARGET)
    assert fresh.call(["echo", 1], timeout_seconds=0.1).problem in ("", "timeout")
    fresh.close()
    assert fresh.call(["sleep", 0.3], timeout_seconds=2).value == 0.3
    fresh.close()


def test_memory_is_bounded(pool):
    reply = pool.call(["allocate", 1 << 30], timeout_seconds=5)
    assert reply.problem == "raised"
    assert "MemoryError" in reply.detail
    assert pool.call(["allocate", 1 << 20], timeout_seconds=5).problem == ""


def test_a_worker_that_dies_at_work_is_reported_and_replaced(pool):
    assert pool.call(["exit"], timeout_seconds=5).problem == "crashed"
    assert pool.call(["echo", 2], timeout_seconds=5).value == 2


def test_a_worker_killed_from_outside_is_replaced_without_a_word(pool):
    pid = pool.call(["pid"], timeout_seconds=5).value
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(pid))
    assert pool.call(["echo", 3], timeout_seconds=5).value == 3


def test_a_template_killed_from_outside_is_replaced_and_takes_its_workers_along(pool):
    pid = pool.call(["pid"], timeout_seconds=5).value
    template = pool.call(["parent"], timeout_seconds=5).value
    os.kill(template, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(pid))
    assert pool.call(["echo", 4], timeout_seconds=5).value == 4


def test_a_template_left_in_the_middle_of_a_command_is_replaced(pool):
    """As by a thread that is stopped there: what it did not read is not the next one's answer."""
    first = pool.call(["parent"], timeout_seconds=5).value
    pool._template._is_answering = True
    pool.call(["exit"], timeout_seconds=5)
    assert pool.call(["parent"], timeout_seconds=5).value != first
    assert not is_alive(first)


def test_a_worker_is_recycled_after_its_share_of_requests():
    pool = WorkerPool(TARGET, recycle_after=3)
    pids = [pool.call(["pid"], timeout_seconds=5).value for _ in range(6)]
    pool.close()
    assert len(set(pids[:3])) == len(set(pids[3:])) == 1
    assert pids[0] != pids[3]


def test_a_target_that_cannot_be_imported_says_why():
    pool = WorkerPool("tests.workers.no_such_module:answer")
    reply = pool.call(["echo", 1], timeout_seconds=5)
    assert reply.problem == "not started"
    assert "no_such_module" in reply.detail


def test_warm_up_runs_once_before_the_first_fork(pool):
    assert pool.call(["warm"], timeout_seconds=5).value == [
        pool.call(["parent"], timeout_seconds=5).value
    ]


def test_a_request_larger_than_any_buffer_goes_through(pool):
    text = "x" * 5_000_000
    assert pool.call(["echo", text], timeout_seconds=10).value == text


def test_nothing_starts_before_the_first_call_and_nothing_is_left_after_close():
    before = set(descendants(os.getpid()))
    files = set(os.listdir("/proc/self/fd"))
    pool = WorkerPool(TARGET)
    assert set(descendants(os.getpid())) == before
    pool.call(["echo", 1], timeout_seconds=5)
    pool.call(["hang"], timeout_seconds=0.05)
    assert len(set(descendants(os.getpid())) - before) >= 1
    pool.close()
    assert set(descendants(os.getpid())) == before
    assert set(os.listdir("/proc/self/fd")) == files


def test_many_kills_leak_no_file_and_no_process(pool):
    pool.call(["echo", 1], timeout_seconds=5)
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        pool.call(["exit"], timeout_seconds=5)
    assert len(os.listdir("/proc/self/fd")) <= files
    template = pool.call(["parent"], timeout_seconds=5).value
    assert len(descendants(template)) <= 2  # those of the pool


def test_a_closed_pool_starts_anew(pool):
    pool.call(["echo", 1], timeout_seconds=5)
    pool.close()
    assert pool.call(["echo", 5], timeout_seconds=5).value == 5


def test_a_pool_that_is_dropped_takes_its_processes_along():
    pool = WorkerPool(TARGET)
    pid = pool.call(["pid"], timeout_seconds=5).value
    del pool
    gc.collect()
    assert wait_until(lambda: not is_alive(pid))


def test_eight_threads_get_their_own_answers_and_two_workers_at_most(pool):
    results = [None] * 8

    def work(thread):
        results[thread] = [
            pool.call(["echo", [thread, i]], timeout_seconds=5).value for i in range(50)
        ]

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[[thread, i] for i in range(50)] for thread in range(8)]
    template = pool.call(["parent"], timeout_seconds=5).value
    assert len(descendants(template)) <= 2


def test_workers_outlive_the_thread_that_started_them(pool):
    pids = []
    thread = threading.Thread(
        target=lambda: pids.append(pool.call(["pid"], timeout_seconds=5).value)
    )
    thread.start()
    thread.join()
    time.sleep(0.05)
    assert pool.call(["pid"], timeout_seconds=5).value == pids[0]


def test_it_works_below_an_event_loop(pool):
    async def ask():
        calls = [asyncio.to_thread(pool.call, ["echo", i], timeout_seconds=5) for i in range(10)]
        return await asyncio.gather(*calls)

    assert [reply.value for reply in asyncio.run(ask())] == list(range(10))


def test_a_thread_that_is_stopped_in_a_call_costs_its_worker_not_the_pool():
    """A reward past its deadline gets SystemExit at its next instruction."""
    from posttrain.workers.deadline import call_with_deadline

    pool = WorkerPool(TARGET, num_workers=1)
    pool.call(["echo", 1], timeout_seconds=5)
    for _ in range(3):
        _, failure = call_with_deadline(
            lambda: pool.call(["hang"], timeout_seconds=0.4), timeout_seconds=0.1
        )
        assert failure.is_timeout
    assert pool.call(["echo", 6], timeout_seconds=5).value == 6
    pool.close()


def test_a_pickled_pool_has_workers_of_its_own(pool):
    pid = pool.call(["pid"], timeout_seconds=5).value
    copy = pickle.loads(pickle.dumps(pool))
    assert copy.call(["pid"], timeout_seconds=5).value != pid
    copy.close()


def call_in_another_process(pool, queue):
    queue.put(pool.call(["parent"], timeout_seconds=10).value)
    pool.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_forked_or_spawned_process_starts_its_own_and_leaves_ours_alone(pool, method):
    ours = pool.call(["parent"], timeout_seconds=5).value
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=call_in_another_process, args=(pool, queue))
    process.start()
    theirs = queue.get(timeout=30)
    process.join(10)
    assert process.exitcode == 0
    assert theirs != ours
    assert wait_until(lambda: not is_alive(theirs))
    assert pool.call(["parent"], timeout_seconds=5).value == ours


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)", "sys.exit(0)"])
def test_workers_end_with_the_process_that_uses_them(end):
    """Also where a process that C code forked meanwhile still holds the socket to the template."""
    program = f"""
import ctypes, os, sys, time
from posttrain.workers.pool import WorkerPool
from tests.processes import descendants, is_alive, wait_until
pool = WorkerPool({TARGET!r})
print(pool.call(["pid"], timeout_seconds=5).value, pool.call(["parent"], timeout_seconds=5).value)
if not ctypes.CDLL(None).fork():
    sys.stdout.close()
    time.sleep(5)
    os._exit(0)
sys.stdout.flush()
import threading
ask = lambda: pool.call(["hang"], timeout_seconds=60)
threading.Thread(target=ask, daemon=True).start()
time.sleep(0.2)
{end}
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pids = list(map(int, run.stdout.readline().split()))
    assert len(pids) == 2
    assert wait_until(lambda: not any(map(is_alive, pids)), seconds=4)
    run.stdout.close()
    run.wait(10)


def test_ctrl_c_does_not_reach_the_workers(pool):
    """They are in a session of their own, so that the terminal's signals pass them by."""
    assert os.getsid(pool.call(["pid"], timeout_seconds=5).value) != os.getsid(0)
