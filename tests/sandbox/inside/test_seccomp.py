"""The filter's rules, by running its instructions here, for both architectures."""

import errno
import platform
import re
from pathlib import Path

import pytest

from posttrain.sandbox.inside import seccomp

EPERM, ENOSYS = (seccomp.ERRNO | number for number in (errno.EPERM, errno.ENOSYS))
MACHINES = seccomp.ARCHITECTURES
DANGEROUS = """
    socket connect bind sendmsg recvmsg ptrace process_vm_readv process_vm_writev mount umount2
    move_mount fsopen fsmount open_tree pivot_root chroot bpf io_uring_setup io_uring_enter
    keyctl add_key request_key userfaultfd perf_event_open unshare setns kexec_load init_module
    finit_module delete_module memfd_create memfd_secret name_to_handle_at open_by_handle_at
    personality kcmp quotactl reboot swapon swapoff acct settimeofday clock_settime adjtimex
    sethostname setuid setgid setgroups setresuid capset seccomp mknodat shmget msgget semget
    mq_open splice vmsplice tee sync syncfs fanotify_init inotify_init1 landlock_restrict_self
    mlock mbind move_pages process_madvise pidfd_getfd ioprio_set sched_setaffinity setpriority
"""


def decide(lines, machine: str, number: int, arguments=(), audit_arch=None) -> int:
    """Run the filter: what it returns for a call."""
    words = {seccomp.NUMBER: number, seccomp.ARCHITECTURE: seccomp.AUDIT_ARCH[machine]}
    if audit_arch is not None:
        words[seccomp.ARCHITECTURE] = audit_arch
    for index in range(6):
        value = arguments[index] if index < len(arguments) else 0
        words[seccomp.FIRST_ARGUMENT + 8 * index] = value & 0xFFFFFFFF
    tests = {
        seccomp.JUMP_EQUAL: int.__eq__,
        seccomp.JUMP_GREATER: int.__gt__,
        seccomp.JUMP_GREATER_OR_EQUAL: int.__ge__,
    }
    at, register = 0, 0
    while True:
        code, if_true, if_false, constant = lines[at]
        at += 1
        if code == seccomp.RETURN:
            return constant
        if code == seccomp.LOAD:
            register = words[constant]
        elif code == seccomp.AND:
            register &= constant
        else:
            at += if_true if tests[code](register, constant) else if_false


def build(machine="x86_64", **settings):
    return seccomp.build_filter(
        machine, **{"allow_subprocess": False, "writable": True, **settings}
    )


def number_of(name: str, machine="x86_64") -> int:
    return seccomp.all_numbers(machine)[name]


@pytest.mark.parametrize("machine", MACHINES)
def test_a_call_is_allowed_exactly_where_it_is_listed(machine):
    by_argument = seccomp.numbers(seccomp.BY_ARGUMENT, machine)
    listed = seccomp.numbers(seccomp.READING, machine)
    listed |= seccomp.numbers(seccomp.ONE_PROCESS, machine)
    groups = {
        (False, False): listed,
        (False, True): listed | seccomp.numbers(seccomp.WRITING, machine),
        (True, False): listed | seccomp.numbers(seccomp.SUBPROCESS, machine),
    }
    for (subprocess, writable), allowed in groups.items():
        lines = build(machine, allow_subprocess=subprocess, writable=writable)
        for number in set(range(seccomp.NEWEST + 1)) - set(by_argument.values()):
            expected = seccomp.ALLOW if number in allowed.values() else EPERM
            assert decide(lines, machine, number) == expected, number


@pytest.mark.parametrize("machine", MACHINES)
def test_newer_calls_and_the_x32_calls_are_missing(machine):
    lines = build(machine, allow_subprocess=True)
    for number in [seccomp.NEWEST + 1, 999, 0x40000000, 0x40000001, 0xFFFFFFFF]:
        assert decide(lines, machine, number) == ENOSYS
    assert decide(lines, machine, number_of("clone3", machine)) == ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
def test_another_instruction_set_kills(machine):
    i386, arm = 0x40000003, 0x40000028
    for audit_arch in [i386, arm, 0]:
        lines = build(machine)
        assert decide(lines, machine, 0, audit_arch=audit_arch) == seccomp.KILL_PROCESS


@pytest.mark.parametrize("machine", MACHINES)
def test_jumps_fit_their_byte_and_the_filter_its_limit(machine):
    lines = build(machine, allow_subprocess=True, refuse_truncation=True)
    assert max(max(line[1], line[2]) for line in lines) < 256
    assert len(lines) < 4096


THREAD, NEW_USERS = 0x10000, 0x10000000


@pytest.mark.parametrize(
    ("flags", "subprocess", "expected"),
    [
        (0x3D0F00, False, seccomp.ALLOW),  # as pthread_create
        (17, False, EPERM),
        (0x4000 | 0x100 | 17, False, EPERM),  # as vfork
        (THREAD | NEW_USERS, False, EPERM),
        (17, True, seccomp.ALLOW),
        (17 | NEW_USERS, True, EPERM),
        (17 | 0x20000, True, EPERM),
        (17 | 0x20000000, True, EPERM),
    ],
)
def test_clone_makes_threads_or_processes_and_never_namespaces(flags, subprocess, expected):
    lines = build(allow_subprocess=subprocess)
    assert decide(lines, "x86_64", number_of("clone"), [flags]) == expected


@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    [
        ("socketpair", [1, 1], True),
        ("socketpair", [1, 1 | 0o2000000], True),
        ("socketpair", [1, 2], False),
        ("socketpair", [2, 1], False),
        ("prctl", [15], True),
        ("prctl", [1], False),
        ("prctl", [22], False),
        ("ioctl", [0, 0x5401], True),
        ("ioctl", [0, 0x5412], False),
        ("fcntl", [0, 3], True),
        ("fcntl", [0, 8], False),
        ("fcntl", [0, 10], False),
        ("prlimit64", [0], True),
        ("prlimit64", [1], False),
        ("kill", [1], True),
    ],
)
def test_arguments_decide(name, arguments, allowed):
    found = decide(build(), "x86_64", number_of(name), arguments)
    assert found == (seccomp.ALLOW if allowed else EPERM)


def test_signals_go_to_the_process_itself_where_others_are_in_sight():
    program = seccomp.pack(build(signals_to_itself_only=True))
    seccomp.set_process(program, 4321)
    lines = [
        (line.code, line.if_true, line.if_false, line.constant)
        for line in program.lines[: program.length]
    ]
    for name in ["kill", "tgkill"]:
        assert decide(lines, "x86_64", number_of(name), [4321]) == seccomp.ALLOW
        for other in [1, 0, -1, -4321, 4322]:
            assert decide(lines, "x86_64", number_of(name), [other]) == EPERM


def test_truncation_is_refused_where_landlock_does_not_know_it():
    lines = build(refuse_truncation=True)
    assert decide(lines, "x86_64", number_of("open"), [0, 0o1000]) == EPERM
    assert decide(lines, "x86_64", number_of("openat"), [0, 0, 0o1001]) == EPERM
    assert decide(lines, "x86_64", number_of("openat"), [0, 0, 0o101]) == seccomp.ALLOW
    assert decide(build(), "x86_64", number_of("openat"), [0, 0, 0o1001]) == seccomp.ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_nothing_dangerous_is_listed(machine):
    groups = [seccomp.READING, seccomp.ONE_PROCESS, seccomp.WRITING, seccomp.SUBPROCESS]
    allowed = {name for group in groups for name in seccomp.numbers(group, machine)}
    assert not allowed & set(DANGEROUS.split())


def test_numbers_are_those_of_the_kernel_headers():
    headers = {
        "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        "aarch64": Path("/usr/include/asm-generic/unistd.h"),
    }
    found = {machine: path for machine, path in headers.items() if path.exists()}
    if not found:
        pytest.skip("no kernel headers installed")
    other_names = {"newfstatat": "fstatat"}
    for machine, path in found.items():
        pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)"
        numbers = {name: int(number) for name, number in re.findall(pattern, path.read_text())}
        for name, number in seccomp.all_numbers(machine).items():
            known = numbers.get(name, numbers.get(other_names.get(name, "")))
            assert known in (number, None), name


def test_every_other_call_is_refused_by_the_running_kernel(sandbox):
    """Calls each number that is not allowed, with zeros, in a real run."""
    machine = platform.machine()
    allowed = set(seccomp.numbers(seccomp.READING, machine).values())
    for group in [seccomp.ONE_PROCESS, seccomp.WRITING, seccomp.BY_ARGUMENT]:
        allowed |= set(seccomp.numbers(group, machine).values())
    # The kernel answers these two itself, before any filter, and only in its own trampolines.
    probes = {335, 336} if machine == "x86_64" else set()
    refused = sorted(set(range(600)) - allowed - probes)
    code = f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(number):
    ctypes.set_errno(0)
    return libc.syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno()
print([n for n in {refused} if call(n) not in [(-1, errno.EPERM), (-1, errno.ENOSYS)]])
"""
    result = sandbox.run(code)
    assert (result.status, result.stdout) == ("ok", "[]\n"), result
