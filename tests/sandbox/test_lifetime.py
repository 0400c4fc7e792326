"""Nothing is left behind: processes, mounts, files, descriptors; forks, pickles, deaths."""

import gc
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from posttrain.sandbox import Limits, Sandbox
from posttrain.sandbox.worker import WorkerError
from tests.processes import descendants, is_alive, wait_until
from tests.sandbox.conftest import started


def children(process: int | None = None) -> list[int]:
    """Ids of all processes below one, by default this one."""
    return descendants(process or os.getpid())


def wait_until_gone(processes: list[int]) -> bool:
    return wait_until(lambda: not any(map(is_alive, processes)))


def traces() -> tuple:
    """What runs could leave in sight: our descriptors, mounts, processes."""
    gc.collect()
    return (
        sorted(os.listdir("/proc/self/fd")),
        Path("/proc/self/mountinfo").read_text(),
        sorted(children()),
    )


MESSY = [
    "open('left', 'w').write('x' * 1000); import os; os.makedirs('a/b')",
    "raise ValueError",
    "import os; os.kill(os.getpid(), 9)",
    "print('x' * 100_000)",
    "import threading; threading.Thread(target=input, daemon=True).start()",
]


@pytest.mark.parametrize("tier", ["namespaces", "landlock", "none"])
def test_runs_leave_nothing(tier):
    before = traces()
    with started(tier) as sandbox:
        for code in MESSY:
            sandbox.run(code)
        between = traces()
        for _ in range(3):
            for code in MESSY:
                sandbox.run(code)
            with sandbox.open("x = 1") as session:
                session.evaluate("x")
        assert traces() == between
    assert traces() == before


def test_a_run_sees_nothing_of_the_run_before(best_sandbox):
    best_sandbox.run("open('left', 'w'); import builtins; builtins.left = 'a marked value 7351'")
    code = (
        "import builtins, gc, os\nprint(os.listdir('.'), hasattr(builtins, 'left'))\n"
        "mark = 'a marked ' + 'value'\n"
        "print([o for o in gc.get_objects() if type(o) is dict and any("
        "type(v) is str and v.startswith(mark) and v is not mark for v in list(o.values()))])"
    )
    for _ in range(4):  # by both workers
        result = best_sandbox.run(code)
        assert result.stdout.startswith("[] False\n[]"), result


def test_the_folder_of_a_run_without_isolation_is_removed():
    with started("none") as sandbox:
        result = sandbox.run("import os; os.makedirs('a/b'); print(os.getcwd())")
        assert result.stdout.startswith("/")
        assert not Path(result.stdout.strip()).exists()


def test_private_folders_are_empty_and_own(forking_sandbox):
    for _ in range(3):
        assert forking_sandbox.run("import os; print(os.listdir())").stdout == "[]\n"
        forking_sandbox.run("open('left', 'w')")


def test_a_closed_sandbox_has_no_processes_and_starts_again():
    others = set(children())
    sandbox = started("auto")
    for line in ["1\n", "2\n"]:
        assert sandbox.run(f"print({line})").stdout == line
        assert set(children()) > others
        sandbox.close()
        assert set(children()) == others


def test_a_forgotten_sandbox_ends_its_workers():
    others = set(children())
    sandbox = started("auto")
    sandbox.run("")
    del sandbox
    gc.collect()
    assert set(children()) == others


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_a_killed_worker_is_replaced(tier):
    with started(tier) as sandbox:
        for _ in range(2):
            assert sandbox.run("print(1)").stdout == "1\n"
            victims = own_workers(sandbox)
            for process in victims:
                os.kill(process, signal.SIGKILL)
            assert wait_until_gone(victims)
        assert sandbox.run("print(host_call(1))", host_call=abs).stdout == "1\n"


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_a_run_whose_worker_is_killed_runs_again(tier):
    with started(tier) as sandbox:
        sandbox.run("")
        victims = own_workers(sandbox)
        killer = threading.Timer(0.15, lambda: [os.kill(each, signal.SIGKILL) for each in victims])
        killer.start()
        result = sandbox.run("import time; time.sleep(0.4); print(1)")
        killer.join()
        assert (result.status, result.stdout) == ("ok", "1\n")


def own_heads(sandbox: Sandbox) -> list[int]:
    return [worker.process.pid for worker in sandbox._pool._idle]


def own_workers(sandbox: Sandbox) -> list[int]:
    return [below for head in own_heads(sandbox) for below in [*children(head), head]]


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_a_worker_that_dies_takes_its_run_with_it(tier):
    with started(tier) as sandbox:
        session = sandbox.open("import time")
        session.evaluate("1")
        worker = session._exchange._worker.process.pid
        family = [*children(worker), worker]
        assert len(family) >= 2
        os.kill(worker, signal.SIGKILL)
        assert session.evaluate("time.sleep(60)").status == "failed"
        session.close()
        assert wait_until_gone(family)
        assert sandbox.run("print(1)").stdout == "1\n"


def test_other_processes_of_the_user_cannot_look_into_a_run(sandbox):
    """The kernel gives the /proc entries of such a process to root."""
    with sandbox.open("x = 1") as session:
        session.evaluate("x")
        below = children(session._exchange._worker.process.pid)
        assert below
        assert [os.stat(f"/proc/{each}/mem").st_uid for each in below] == [0] * len(below)


CALLER = """
import os, sys, threading, time
from posttrain.sandbox import Limits, Sandbox
sandbox = Sandbox(tier=sys.argv[1], num_workers=2)
sandbox.describe()
code = "import time\\nhost_call(0)\\nwhile True: time.sleep(1)"
all_run = threading.Barrier(3)
for _ in range(2):
    limits = Limits(wall_seconds=60)
    run = lambda: sandbox.run(code, limits=limits, host_call=lambda _: all_run.wait(30))
    threading.Thread(target=run, daemon=True).start()
all_run.wait(30)
print("running", flush=True)
sys.stdin.readline()
bystander = os.fork()  # holds copies of all our sockets, so that none of them closes
if bystander:
    print(bystander, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_a_killed_caller_leaves_nothing(tier):
    started(tier).close()
    with subprocess.Popen(
        [sys.executable, "-c", CALLER, tier],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as caller:
        assert caller.stdout.readline() == b"running\n"
        family = children(caller.pid)
        assert len(family) >= 4
        caller.stdin.write(b"\n")
        caller.stdin.flush()
        bystander = int(caller.stdout.readline())
        caller.kill()
        try:
            assert wait_until_gone(family)
        finally:
            os.kill(bystander, signal.SIGKILL)


def test_a_worker_outlives_the_thread_that_started_it():
    with started("auto") as sandbox:
        thread = threading.Thread(target=sandbox.run, args=["print(1)"])
        thread.start()
        thread.join()
        workers = own_workers(sandbox)
        time.sleep(0.1)
        assert sandbox.run("print(2)").stdout == "2\n"
        assert own_workers(sandbox) == workers


def use(sandbox: Sandbox, answers) -> None:
    answers.put((sandbox.run("print(7)").stdout, sandbox.tier))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_uses_it_with_workers_of_its_own(best_sandbox, method):
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    process = context.Process(target=use, args=[best_sandbox, answers])
    process.start()
    assert answers.get() == ("7\n", best_sandbox.tier)
    process.join()
    assert process.exitcode == 0
    assert best_sandbox.run("print(8)").stdout == "8\n"


def test_a_fork_while_runs_go_on_disturbs_neither(best_sandbox):
    with best_sandbox.open("x = 1") as session:
        child = os.fork()
        if not child:
            ok = best_sandbox.run("print(9)").stdout == "9\n"
            os._exit(0 if ok else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert session.evaluate("x").data == 1


def test_a_fork_does_not_end_the_workers_of_its_parent_when_it_exits(best_sandbox):
    best_sandbox.run("")
    finalizer = best_sandbox._finalizer
    child = os.fork()
    if not child:
        os._exit(1 if finalizer.alive else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert finalizer.alive


def test_workers_beyond_the_number_that_was_asked_for_do_not_stay(best_sandbox):
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(best_sandbox.open("")).evaluate("1")
    assert len(own_heads(best_sandbox)) == 2


def test_a_worker_is_given_no_environment(best_sandbox, monkeypatch):
    """What it was once given would stay in its memory, and in that of its forks."""
    monkeypatch.setenv("POSTTRAIN_TEST_SECRET", "7351")
    with started(best_sandbox.tier) as sandbox:
        sandbox.run("")
        for head in own_heads(sandbox):
            assert Path(f"/proc/{head}/environ").read_bytes() == b""


def test_a_pickled_sandbox_keeps_its_settings():
    sandbox = Sandbox(tier="landlock", num_workers=3, limits=Limits(wall_seconds=1.5))
    assert pickle.loads(pickle.dumps(sandbox)).__getstate__() == sandbox.__getstate__()


def test_without_a_worker_a_run_is_our_failure(monkeypatch):
    with started("auto") as sandbox:
        sandbox.close()

        def refuse(*_, **__):
            raise WorkerError("no more processes")

        monkeypatch.setattr("posttrain.sandbox.sandbox.Worker", refuse)
        assert sandbox.run("print(1)").status == "failed"
        with sandbox.open("x = 1") as session:
            value = session.evaluate("x")
        assert (value.status, value.detail) == ("failed", "no more processes")


def test_out_of_descriptors_is_our_failure_and_leaks_none(best_sandbox):
    best_sandbox.run("")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    for spare in range(1, 9):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) - 1 + spare, hard))
        try:
            status = best_sandbox.run("print(1)").status
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert status in ("failed", "ok")
        assert len(os.listdir("/proc/self/fd")) <= len(before) + 1
    assert best_sandbox.run("print(1)").stdout == "1\n"


def test_a_caller_that_ignores_or_blocks_signals_changes_nothing():
    own = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXCPU, signal.SIGTERM])
    try:
        sandbox = started("auto")
        code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
        assert sandbox.run(code).status == "killed"
        assert sandbox.run("print(1)").stdout == "1\n"
    finally:
        signal.signal(signal.SIGCHLD, own)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        sandbox.close()
