"""Which isolation works on this machine: found by trying, strongest first."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from typing import Any

from posttrain.sandbox import canaries, syscalls, wire
from posttrain.sandbox.exchange import Exchange
from posttrain.sandbox.interface import Limits, SandboxUnavailableError
from posttrain.sandbox.session import LocalSession
from posttrain.sandbox.worker import Worker, WorkerError

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


def find_tier(
    wanted: str,
    start_worker: Callable[[str], Worker],
    allow_subprocess: bool,
    limits: Limits,
) -> dict[str, Any]:
    """The first tier that stops every canary, and how that was found. See `Sandbox.describe`."""
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailableError("The sandbox needs Linux. Pass a remote executor instead.")
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
) -> tuple[dict[str, str], dict[str, Any]]:
    """What the canaries could do in this tier, and the worker's notes. WorkerError: no worker."""
    if platform.machine() not in syscalls.ARCHITECTURES:
        raise WorkerError(f"no system call filter for {platform.machine()}")
    if tier == "landlock" and allow_subprocess:
        raise WorkerError("has no process namespaces, which allow_subprocess needs")
    worker = start_worker(tier)
    job = wire.frame({"code": canaries.PROBE, "serve": True})
    exchange = Exchange(worker, job, canaries.PROBE_LIMITS)
    with LocalSession(exchange, canaries.PROBE_LIMITS, worker.close) as session:
        found = canaries.probe(
            session, allow_subprocess=allow_subprocess, max_processes=limits.max_processes
        )
    return found, worker.notes


def explain(not_used: dict[str, str]) -> str:
    """The message of SandboxUnavailableError."""
    lines = ["No isolation for untrusted code works on this machine."]
    for tier, problem in not_used.items():
        lines += [f"  {tier}: {problem}", f"    It needs: {HOW_TO_ENABLE[tier]}"]
    lines += [
        "Or pass a remote executor, or tier='none' to run the code without any isolation.",
    ]
    return "\n".join(lines)
