"""Does a tier hold? Tried by doing: a program attempts what it must not be able to do.

The targets are real: a file, a listener, this process.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from posttrain.sandbox.interface import Limits, Session

PROBE_LIMITS = Limits(wall_seconds=20.0, cpu_seconds=10.0, memory_bytes=256 << 20)

# A canary returns what it could do; an OSError or MemoryError stops it.
PROBE = """
import os, signal, socket, tabnanny, threading  # one that no worker has loaded before

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


def probe(session: Session, *, allow_subprocess: bool, max_processes: int) -> dict[str, str]:
    """What each canary could do, "" where it was stopped as it should be."""
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


def _try(session: Session, name: str, arguments: list) -> str:
    value = session.call("attempt", [name, *arguments])
    return value.data if value.status == "ok" else f"{value.status}: {value.detail}"
