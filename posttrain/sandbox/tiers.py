"""Finding the isolation that works on this machine: by trying, strongest first.

A tier holds if a program that runs in it cannot do what it must not be able to do. Each attempt of
that program is called a canary.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from posttrain.sandbox import wire
from posttrain.sandbox.exchange import Exchange
from posttrain.sandbox.inside import seccomp
from posttrain.sandbox.interface import Limits, SandboxUnavailableError, Session
from posttrain.sandbox.session import LocalSession
from posttrain.sandbox.wire import PlainData
from posttrain.sandbox.worker import Worker, WorkerError

Description: TypeAlias = "dict[str, PlainData]"  # see `Sandbox.describe`

TIERS = ("namespaces", "landlock", "bubblewrap")
HOW_TO_ENABLE = {
    "namespaces": "Linux 5.12 or newer that lets this user make user namespaces. Ubuntu: sysctl "
    "kernel.apparmor_restrict_unprivileged_userns=0. Debian: sysctl "
    "kernel.unprivileged_userns_clone=1. Docker: --security-opt seccomp=unconfined --security-opt "
    "apparmor=unconfined, or profiles that allow unshare, mount and pivot_root.",
    "landlock": "Linux 5.13 or newer with landlock among its security modules (boot parameter "
    "lsm=landlock,…). Docker: a seccomp profile that knows the landlock calls.",
    "bubblewrap": "install bubblewrap (bwrap), and let it make user namespaces.",
}
PROBE_LIMITS = Limits(wall_seconds=20.0, cpu_seconds=10.0, memory_bytes=256 << 20)

# The program that probes a tier. A canary returns what it could do, or raises what stopped it.
PROBE = """
import os, signal, socket, tabnanny, threading  # tabnanny: one that no worker has loaded before

def attempt(name, *arguments):
    try:
        return globals()[name](*arguments)
    except (OSError, MemoryError):
        return ""

def host_file(path):
    with open(path) as file:
        return "read " + file.read()

def environment(names, pid):
    found = sorted(set(names) & set(os.environ))
    for process in ["self", str(pid)]:
        try:
            with open(f"/proc/{process}/environ") as file:
                found.append(file.name)
        except OSError:
            pass
    return "saw " + " ".join(found) if found else ""

def network(port):
    socket.create_connection(("127.0.0.1", port), 5).close()
    return "connected"

def write_outside(folder):
    done = []
    for target in [folder, "/", "/usr", "/etc", "/home", "/var/tmp", "/dev", "/root"]:
        try:
            os.close(os.open(target + "/posttrain_canary", os.O_CREAT | os.O_WRONLY))
            done.append(target)
            os.unlink(target + "/posttrain_canary")
        except OSError:
            pass
    return "wrote to " + " ".join(done) if done else ""

def signals(pid):
    os.kill(pid, 0)
    return "can signal the caller"

def privileges():
    os.chroot("/")
    return "can chroot"

def memory(num_bytes):
    return f"allocated {len(bytearray(num_bytes))} bytes"

def execute():
    if not os.fork():
        os.execv("/bin/true", ["true"])
    return "can execute"

def fork(at_most):
    children = []
    try:
        while len(children) <= at_most:
            child = os.fork()
            if not child:
                signal.pause()
                os._exit(0)
            children.append(child)
    except OSError:
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return f"more than {at_most} forks" if len(children) > at_most else ""

def ordinary_work():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    with open("/dev/urandom", "rb") as file:
        return "" if file.read(1) else "no random bytes"
"""


def find_tier(
    wanted: str,
    start_worker: Callable[[str], Worker],
    allow_subprocess: bool,
    limits: Limits,
) -> Description:
    """Find the first tier that stops every canary, and describe it as in `Sandbox.describe`."""
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailableError(
            f"The sandbox needs Linux, and this is {sys.platform}. Pass a remote executor instead."
        )
    if wanted == "none":
        return {"tier": "none", "canaries": {}, "not_used": {}}
    not_used: dict[str, str] = {}
    for tier in TIERS if wanted == "auto" else [wanted]:
        try:
            found, notes = try_tier(tier, start_worker, allow_subprocess, limits)
        except WorkerError as problem:
            not_used[tier] = str(problem)
            continue
        if not any(found.values()):
            results = dict.fromkeys(found, "stopped") | {"ordinary_work": "works"}
            return {"tier": tier, **notes, "canaries": results, "not_used": not_used}
        not_used[tier] = "; ".join(f"{name}: {what}" for name, what in found.items() if what)
    raise SandboxUnavailableError(explain(not_used))


def try_tier(
    tier: str, start_worker: Callable[[str], Worker], allow_subprocess: bool, limits: Limits
) -> tuple[dict[str, str], dict[str, PlainData]]:
    """Return what the canaries could do in this tier, and the worker's notes.

    Raises:
        WorkerError: No worker of this tier can be started.
    """
    if platform.machine() not in seccomp.ARCHITECTURES:
        raise WorkerError(f"no system call filter for {platform.machine()}")
    if tier == "landlock" and allow_subprocess:
        raise WorkerError("has no process namespaces, which allow_subprocess needs")
    worker = start_worker(tier)
    job = wire.frame({"code": PROBE, "serve": True})
    exchange = Exchange(worker, job, PROBE_LIMITS)
    with LocalSession(exchange, PROBE_LIMITS, worker.close) as session:
        found = probe(
            session, allow_subprocess=allow_subprocess, max_processes=limits.max_processes
        )
    return found, worker.notes


def probe(session: Session, *, allow_subprocess: bool, max_processes: int) -> dict[str, str]:
    """Have each canary attempt its escape on real targets: a file, a listener, this process.

    Returns:
        For each canary what it could do; "" if it was stopped, as it should be.
    """
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as listener:
        folder = Path(name)
        folder.chmod(0o755)
        secret = folder / "secret"
        secret.write_text("a host file")
        attempts = {
            "host_file": [str(secret)],
            "environment": [[*os.environ], os.getpid()],
            "network": [listener.getsockname()[1]],
            "write_outside": [str(folder)],
            "signals": [os.getpid()],
            "privileges": [],
            "memory": [2 * PROBE_LIMITS.memory_bytes],
            "fork": [max_processes if allow_subprocess else 0],
            **({} if allow_subprocess else {"execute": []}),
            "ordinary_work": [],
        }
        return {name: _try(session, name, arguments) for name, arguments in attempts.items()}


def _try(session: Session, name: str, arguments: list[PlainData]) -> str:
    value = session.call("attempt", [name, *arguments])
    return value.data if value.status == "ok" else f"{value.status}: {value.detail}"


def explain(not_used: dict[str, str]) -> str:
    """Compose the message of SandboxUnavailableError from each tier's problem."""
    lines = ["No isolation for untrusted code works on this machine."]
    for tier, problem in not_used.items():
        lines += [f"  {tier}: {problem}", f"    It needs: {HOW_TO_ENABLE[tier]}"]
    lines += [
        "Or pass a remote executor, or tier='none' to run the code without any isolation.",
    ]
    return "\n".join(lines)
