"""How a program ends: by signals, without its reader, on a full disk."""

import errno
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.run.options import plain_errors

ROOT = Path(__file__).parents[2]


def test_losing_stdout_ends_nothing(tmp_path):
    """As under `| head -1`: the program goes on, and ends well."""
    program = (
        "from posttrain.run.options import plain_errors, say\n"
        "with plain_errors():\n"
        "    for i in range(20000): say('line')\n"
        f"    open({str(tmp_path / 'end')!r}, 'w').close()\n"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} | head -1"
    script = f"set -o pipefail; {command}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "line\n", "")
    assert (tmp_path / "end").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_before_training_is_one_line_and_its_status(name, capsys):
    number = signal.Signals[name]
    with pytest.raises(SystemExit) as stopped, plain_errors():
        os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().err == f"stopped by {name}\n"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device", "a/b"),
                                   PermissionError(errno.EACCES, "Permission denied", "a/b"),
                                   OSError(errno.EFBIG, "File too large")])  # fmt: skip
def test_what_the_disk_refuses_is_one_line(error, capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended, plain_errors():
        raise error
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert error.strerror in said
    monkeypatch.setattr(sys, "argv", ["recipe", "--debug"])
    with pytest.raises(OSError), plain_errors():  # noqa: PT011  (the very error)
        raise error
