"""Finding the isolation that holds: canaries, order, messages."""

import logging
import os
import platform
import shutil
from functools import partial
from pathlib import Path

import pytest

from posttrain.sandbox import Limits, Sandbox, SandboxUnavailableError, tiers
from posttrain.sandbox.worker import Worker, WorkerError
from tests.sandbox import hostile
from tests.sandbox.conftest import started

SUBPROCESS = Limits(wall_seconds=20)


def test_the_metadata_says_which_tier_and_what_was_tried(any_sandbox):
    found = any_sandbox.describe()
    assert found["tier"] == any_sandbox.tier
    assert set(found["canaries"].values()) == {"stopped", "works"}
    assert {"host_file", "environment", "network", "write_outside", "memory", "fork"} <= set(
        found["canaries"]
    )
    assert found["not_used"] == {}


def test_a_worker_shares_no_namespace_and_its_files_are_read_only():
    """Each alone would be hidden by the filter or by file permissions."""
    with started("namespaces") as sandbox, sandbox.open("import os") as session:
        session.evaluate("1")
        worker = session._exchange._worker.process.pid
        for kind in ["user", "mnt", "net", "ipc", "uts"]:
            assert os.readlink(f"/proc/{worker}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
        assert session.evaluate("os.getpid()").data < 10
        for path in ["/", "/usr", "/dev", os.__file__]:
            flags = session.evaluate(f"os.statvfs({path!r}).f_flag").data
            assert flags & os.ST_RDONLY
            assert flags & os.ST_NOSUID


def test_auto_takes_the_first_tier_that_holds(monkeypatch):
    tried = []

    def try_tier(tier, *_):
        tried.append(tier)
        if tier == "namespaces":
            raise WorkerError("unshare: Operation not permitted")
        return {"network": "connected" if tier == "landlock" else "", "fork": ""}, {}

    monkeypatch.setattr(tiers, "try_tier", try_tier)
    found = tiers.find_tier("auto", None, False, Limits())
    assert tried == ["namespaces", "landlock", "bubblewrap"]
    assert found["tier"] == "bubblewrap"
    assert found["not_used"] == {
        "namespaces": "unshare: Operation not permitted",
        "landlock": "network: connected",
    }


def test_without_any_tier_the_error_says_what_failed_and_how_to_enable_it(monkeypatch):
    def try_tier(tier, *_):
        raise WorkerError(f"{tier} is broken")

    monkeypatch.setattr(tiers, "try_tier", try_tier)
    with pytest.raises(SandboxUnavailableError) as caught:
        Sandbox().run("print(1)")
    for words in ["namespaces is broken", "landlock is broken", "apparmor", "tier='none'"]:
        assert words in str(caught.value)


def test_canaries_find_that_no_isolation_isolates():
    """The negative control: without isolation every escape succeeds."""
    start_worker = partial(Worker, allow_subprocess=False, scratch_bytes=1 << 20)
    found, _ = tiers.try_tier("none", start_worker, False, Limits())
    escapes = {name for name, what in found.items() if what}
    assert {"host_file", "network", "write_outside", "signals", "fork", "execute"} <= escapes
    assert "environment" in escapes
    assert not found["memory"]
    assert not found["ordinary_work"]
    assert not any(Path(folder, "posttrain_canary").exists() for folder in ["/", "/usr", "/home"])


def test_no_isolation_is_only_by_name_and_warns_at_every_start(caplog):
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING), Sandbox(tier="none") as sandbox:
            assert sandbox.run("print(1)").stdout == "1\n"
            assert sandbox.tier == "none"
        assert "WITHOUT isolation" in caplog.text


def test_an_unknown_tier_and_no_workers_are_errors():
    with pytest.raises(ValueError, match="Expected auto, none, namespaces"):
        Sandbox(tier="chroot")
    with pytest.raises(ValueError, match="at least 1"):
        Sandbox(num_workers=0)


def test_an_unknown_processor_is_named(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxUnavailableError, match="no system call filter for riscv64"):
        Sandbox().describe()


def test_another_system_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(SandboxUnavailableError, match="remote executor"):
        Sandbox().describe()


def test_landlock_does_not_allow_subprocesses():
    with pytest.raises(SandboxUnavailableError, match="no process namespaces"):
        Sandbox(tier="landlock", allow_subprocess=True).describe()


def test_missing_bubblewrap_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SandboxUnavailableError, match="not installed"):
        Sandbox(tier="bubblewrap").describe()


def test_bubblewrap_refuses_what_the_other_tiers_refuse():
    """All attempts in one run, since each run starts Python anew."""
    skipped = {"signal everybody"}  # ends the run by killing what waits for it
    attempts = {
        name: statement
        for name, statement in hostile.REFUSED.items()
        if "{" not in statement.replace("{{", "") and name not in skipped
    }
    code = hostile.prelude("".join(attempts.values())) + "done = []\n"
    for name, statement in attempts.items():
        code += f"try:\n    {statement}\n    done.append({name!r})\n"
        code += "except (OSError, ValueError): pass\n"
    with started("bubblewrap") as sandbox:
        result = sandbox.run(code.replace("{{}}", "{}") + "print(done)", limits=SUBPROCESS)
        assert (result.status, result.stdout) == ("ok", "[]\n"), result


def test_a_probe_uses_the_limits_that_it_allows():
    assert tiers.PROBE_LIMITS.memory_bytes < Limits().memory_bytes
