"""The system calls that untrusted code may make, as a program for the kernel's seccomp filter.

    pack(build_filter(platform.machine(), allow_subprocess=False, writable=True))

An allow list: what is not named is refused, so a call that a later kernel adds is refused as well.
A refused call fails with EPERM, which Python shows as PermissionError; one that is newer than this
file, and clone3, whose arguments a filter cannot see, fail with ENOSYS, so that libc falls back to
the older call. Another instruction set than the machine's own kills the process.

A filter is a list of (code, jump if true, jump if false, constant), the classic BPF of
linux/filter.h, over struct seccomp_data: number, architecture, instruction pointer, six arguments.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable

from posttrain.sandbox import syscalls

Instruction = tuple[int, int, int, int]

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LOAD, AND, JUMP_EQUAL, JUMP_GREATER, RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
JUMP_GREATER_OR_EQUAL = 0x35
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
KILL_PROCESS, ALLOW, ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
PERMITTED = [(RETURN, 0, 0, ALLOW)]
REFUSED = [(RETURN, 0, 0, ERRNO | errno.EPERM)]
MISSING = [(RETURN, 0, 0, ERRNO | errno.ENOSYS)]

THIS_PROCESS = 0x7FFFFFFF  # stands for the process id, which is known after the fork

CLONE_THREAD = 0x00010000
CLONE_NEW_NAMESPACES = 0x7E020000
O_TRUNC = 0o1000
AF_UNIX, SOCK_STREAM, SOCKET_TYPE = 1, 1, 0xF
PR_SET_NAME, PR_GET_NAME, PR_SET_VMA = 15, 16, 0x53564D41
# Asking and duplicating. Not F_SETOWN and F_SETSIG, which send signals to other processes.
FCNTL_COMMANDS = [0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032]
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: isatty, non-blocking, inheritable.
IOCTL_REQUESTS = [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]


def _argument(index: int) -> Instruction:
    """Load the low half of an argument; all that are looked at are ints."""
    return (LOAD, 0, 0, FIRST_ARGUMENT + 8 * index)


def _if_one_of(index: int, values: Iterable[int]) -> list[Instruction]:
    tests = [line for value in values for line in [(JUMP_EQUAL, 0, 1, value), *PERMITTED]]
    return [_argument(index), *tests, *REFUSED]


def _if_masked(index: int, mask: int, value: int) -> list[Instruction]:
    return [_argument(index), (AND, 0, 0, mask), (JUMP_EQUAL, 0, 1, value), *PERMITTED, *REFUSED]


def _by_argument(*, allow_subprocess: bool, signals_to_itself_only: bool) -> dict[str, list]:
    threads = _if_masked(0, CLONE_THREAD | CLONE_NEW_NAMESPACES, CLONE_THREAD)
    processes = _if_masked(0, CLONE_NEW_NAMESPACES, 0)
    signals = _if_one_of(0, [THIS_PROCESS]) if signals_to_itself_only else PERMITTED
    return {
        "clone": processes if allow_subprocess else threads,
        "clone3": MISSING,
        # Only streams: a datagram socket can send to any address without being connected.
        "socketpair": [
            *[_argument(0), (JUMP_EQUAL, 1, 0, AF_UNIX), *REFUSED],
            *_if_masked(1, SOCKET_TYPE, SOCK_STREAM),
        ],
        "prctl": _if_one_of(0, [PR_SET_NAME, PR_GET_NAME, PR_SET_VMA]),
        "ioctl": _if_one_of(1, IOCTL_REQUESTS),
        "fcntl": _if_one_of(1, FCNTL_COMMANDS),
        "kill": signals,
        "tgkill": signals,
        "prlimit64": _if_one_of(0, [0]),
    }


def build_filter(
    machine: str,
    *,
    allow_subprocess: bool,
    writable: bool,
    signals_to_itself_only: bool = False,
    refuse_truncation: bool = False,
) -> list[Instruction]:
    """The filter as instructions.

    Args:
        machine: "x86_64" or "aarch64".
        allow_subprocess: Allows fork and exec.
        writable: There is a private folder to write to, and no other.
        signals_to_itself_only: Refuses signals to other processes; `set_process` says which it is.
        refuse_truncation: Refuses to open a file with O_TRUNC, which Landlock did not know before
            its third version.
    """
    groups = [syscalls.READING, syscalls.ONE_PROCESS]
    groups += [syscalls.WRITING] * writable + [syscalls.SUBPROCESS] * allow_subprocess
    rules = {name: PERMITTED for group in groups for name in syscalls.numbers(group, machine)}
    if refuse_truncation:
        rules |= {"open": _if_masked(1, O_TRUNC, 0), "openat": _if_masked(2, O_TRUNC, 0)}
    rules |= _by_argument(
        allow_subprocess=allow_subprocess, signals_to_itself_only=signals_to_itself_only
    )

    by_number = {
        number: rules[name]
        for name, number in syscalls.all_numbers(machine).items()
        if name in rules
    }
    lines: list[Instruction] = [(LOAD, 0, 0, ARCHITECTURE)]
    lines += [(JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL_PROCESS)]
    lines += [(LOAD, 0, 0, NUMBER)]
    for first, last, rule in _ranges(by_number):
        # Ascending, so one jump passes a range over: the kernel walks this for every number.
        lines += [(JUMP_GREATER, len(rule) + 2, 0, last)]
        lines += [(JUMP_GREATER_OR_EQUAL, 1, 0, first), *REFUSED, *rule]
    # The x32 calls of x86_64 have numbers from 1 << 30: they are among the missing ones.
    return [*lines, (JUMP_GREATER, 0, 1, syscalls.NEWEST), *MISSING, *REFUSED]


def _ranges(rules: dict[int, list[Instruction]]) -> list[tuple[int, int, list[Instruction]]]:
    """Ascending (first, last, rule), neighbours with the same rule joined."""
    ranges: list[tuple[int, int, list[Instruction]]] = []
    for number, rule in sorted(rules.items()):
        if ranges and ranges[-1][1] == number - 1 and ranges[-1][2] == rule:
            ranges[-1] = (ranges[-1][0], number, rule)
        else:
            ranges.append((number, number, rule))
    return ranges


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("constant", ctypes.c_uint32),
    )


class FilterProgram(ctypes.Structure):
    """struct sock_fprog. Keeps its instructions alive, and knows those that hold THIS_PROCESS."""

    process_lines: list[int]
    _fields_ = (("length", ctypes.c_uint16), ("lines", ctypes.POINTER(_Instruction)))


def pack(lines: list[Instruction]) -> FilterProgram:
    """The filter as the kernel reads it."""
    program = FilterProgram(len(lines), (_Instruction * len(lines))(*lines))
    program.process_lines = [at for at, line in enumerate(lines) if line[3] == THIS_PROCESS]
    return program


def set_process(program: FilterProgram, process: int) -> None:
    """Put a process id in the place of THIS_PROCESS."""
    for at in program.process_lines:
        program.lines[at].constant = process
