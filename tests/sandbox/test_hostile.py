"""Programs that attack, in each tier: each ends as it should, and the next run is a clean one."""

import os
import platform
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.sandbox import Limits
from tests.sandbox import hostile

SHORT = Limits(wall_seconds=0.2, cpu_seconds=5, memory_bytes=128 << 20)
SMALL = replace(SHORT, wall_seconds=20.0)
AMPLE = replace(SMALL, memory_bytes=256 << 20)
NUMBERS = {  # of calls that have no wrapper in libc
    "x86_64": {
        "vfork": 56,
        "add_key": 248,
        "bpf": 321,
        "userfaultfd": 323,
        "perf_event_open": 298,
        "init_module": 175,
    },
    "aarch64": {
        "vfork": 220,
        "add_key": 217,
        "bpf": 280,
        "userfaultfd": 282,
        "perf_event_open": 241,
        "init_module": 105,
    },
}


@pytest.fixture(scope="module")
def targets():
    """What the programs aim at: this process, a listener of it, its files."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield {
            "pid": os.getpid(),
            "port": listener.getsockname()[1],
            "cwd": str(Path(__file__).parent),
            "this_file": __file__,
            **NUMBERS[platform.machine()],
        }


def attempt(statement: str) -> str:
    """A program that says whether a statement was refused."""
    return (
        f"{hostile.prelude(statement)}\ntry:\n    {statement}\n"
        "except (OSError, ValueError):\n    print('refused')\nelse:\n    print('done')\n"
    )


@pytest.mark.parametrize("name", hostile.REFUSED)
def test_what_leads_out_is_refused(sandbox, targets, name):
    result = sandbox.run(attempt(hostile.REFUSED[name].format(**targets)), limits=AMPLE)
    assert (result.status, result.stdout) == ("ok", "refused\n"), result
    assert not Path("/usr/posttrain_left").exists()
    assert not Path(targets["cwd"], "posttrain_left").exists()


@pytest.mark.parametrize("name", hostile.SCRATCH)
def test_files_can_be_written_where_they_are_private(sandbox, name):
    result = sandbox.run(attempt(hostile.SCRATCH[name]), limits=AMPLE)
    expected = "done\n" if sandbox.tier == "namespaces" else "refused\n"
    assert (result.status, result.stdout) == ("ok", expected), result


@pytest.mark.parametrize("name", hostile.FULL)
def test_the_private_folder_has_its_limits(sandbox, name):
    result = sandbox.run(attempt(hostile.FULL[name]), limits=AMPLE)
    assert (result.status, result.stdout) == ("ok", "refused\n"), result


@pytest.mark.parametrize("name", hostile.ENDED)
def test_a_program_ends_as_it_should(sandbox, name):
    code, expected = hostile.ENDED[name]
    result = sandbox.run(code, limits=SHORT if expected == "timeout" else SMALL)
    assert result.status in (expected if isinstance(expected, tuple) else (expected,)), result


@pytest.mark.parametrize("name", hostile.HARMLESS)
def test_a_program_may_do_as_it_likes_with_itself(sandbox, name):
    code, expected = hostile.HARMLESS[name]
    result = sandbox.run(code, limits=AMPLE)
    assert result.stdout == expected, result
    assert sandbox.run("print(len([1]), 1000003)").stdout == "1 1000003\n"
