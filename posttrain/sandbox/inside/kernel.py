"""Calls to the Linux kernel that Python's `os` lacks, made through ctypes.

Each raises OSError on failure. This module runs inside a worker; our side uses only `open_process`.
Sources: the manual pages of the calls, linux/landlock.h, linux/mount.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal

from posttrain.sandbox.inside import seccomp

MACHINE = platform.machine()

NEW_MOUNTS, NEW_UTS, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USERS, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000

BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x40000
NOSUID, NODEV, NOEXEC = 0x2, 0x4, 0x8
DETACH = 2
_AT_RECURSIVE = 0x8000
MOUNT_READ_ONLY, MOUNT_NOSUID, MOUNT_NODEV, MOUNT_NOEXEC = 0x1, 0x2, 0x4, 0x8

_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES = 1, 4, 22, 38
_SECCOMP_FILTER = 2
_CAPABILITY_VERSION = 0x20080522
_MALLOC_ARENAS = -8  # M_ARENA_MAX

_SHARE_MEMORY = 0x100  # CLONE_VM
_FIRST_PROCESS_STACK = ctypes.create_string_buffer(1 << 14)  # its size keeps the top aligned

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_NUMBERS = seccomp.all_numbers(MACHINE) if MACHINE in seccomp.ARCHITECTURES else {}


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(name: str, *arguments: object) -> int:
    if name not in _NUMBERS:
        raise OSError(errno.ENOSYS, f"{name}: its number on {MACHINE} is not known here")
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_libc.syscall(ctypes.c_long(_NUMBERS[name]), *wide), name)


def _prctl(option: int, value: object, *, what: str) -> None:
    wide = ctypes.c_ulong(value) if isinstance(value, int) else value
    rest = [ctypes.c_ulong(0)] * 3
    _checked(_libc.prctl(ctypes.c_int(option), wide, *rest), what)


def unshare(flags: int) -> None:
    """Leave the namespaces shared with the parent process for new ones."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def start_first_process() -> int:
    """Start process 1 of a new process namespace, which only waits, and return its id out here.

    The process executes libc's `pause` on its own stack in this process's memory, so no memory is
    copied. Nothing in its namespace can stop it: the kernel spares a first process from signals
    that it has no handler for. It ignores SIGCHLD, so that the kernel reaps orphans.
    """
    top_of_stack = ctypes.byref(_FIRST_PROCESS_STACK, len(_FIRST_PROCESS_STACK))
    flags = ctypes.c_int(NEW_PIDS | _SHARE_MEMORY | signal.SIGCHLD)
    own = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        return _checked(_libc.clone(_libc.pause, top_of_stack, flags, None), "clone")
    finally:
        signal.signal(signal.SIGCHLD, own)


def open_process(process: int) -> int:
    """Open a pidfd, as `os.pidfd_open` does; Pythons built on old systems lack that function."""
    return _syscall("pidfd_open", process, 0)


def enter_namespaces_of(pidfd: int, flags: int) -> None:
    """Join the namespaces of a process. A process namespace applies to later children only."""
    _checked(_libc.setns(ctypes.c_int(pidfd), ctypes.c_int(flags)), "setns")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Call mount(2). Empty strings are passed as NULL."""
    texts = [text.encode() or None for text in (source, target, kind, options)]
    result = _libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3])
    _checked(result, f"mount {kind or source} on {target}")


def detach(target: str) -> None:
    """Unmount a tree lazily: it is out of sight at once."""
    _checked(_libc.umount2(target.encode(), DETACH), f"unmount {target}")


def pivot_root(new_root: str, old_root: str) -> None:
    """Make `new_root` the root and put the old root at `old_root`, which lies below it."""
    _syscall("pivot_root", new_root.encode(), old_root.encode())


def set_mount_flags(target: str, flags: int) -> None:
    """Add flags to a mount and to all mounts below it. Needs Linux 5.12."""

    class Attributes(ctypes.Structure):
        _fields_ = tuple((name, ctypes.c_uint64) for name in ("on", "off", "propagation", "users"))

    attributes = Attributes(flags, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    path = target.encode()
    _syscall("mount_setattr", -1, path, _AT_RECURSIVE, ctypes.byref(attributes), size)


def drop_capabilities() -> None:
    """Give up every capability, for good once `forbid_new_privileges` was called."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _syscall("capset", ctypes.byref(header), ctypes.byref(nothing))


def forbid_new_privileges() -> None:
    """Forbid that a program executed from now on gains privileges from its file."""
    _prctl(_SET_NO_NEW_PRIVILEGES, 1, what="no new privileges")


def set_dumpable(allowed: bool) -> None:
    """Set whether processes of the same user may read this one's memory and /proc entries."""
    _prctl(_SET_DUMPABLE, int(allowed), what="dumpable")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends.

    A change of user resets this, so call it after any.
    """
    _prctl(_SET_DEATH_SIGNAL, 9, what="death signal")
    if os.getppid() != parent:
        os._exit(1)


def install_filter(program: seccomp.FilterProgram) -> None:
    """Apply a seccomp filter to this process and to all that it starts."""
    result = _libc.prctl(_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(program), 0, 0)
    _checked(result, "seccomp")


def use_one_malloc_arena() -> None:
    """Keep glibc from reserving 64 MB of the address space limit for each thread."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_MALLOC_ARENAS, 1)


def reset_signals() -> None:
    """Restore default actions and unblock all signals.

    The caller's ignored and blocked signals survive `exec`, so that a worker inherits them.
    """
    kept = {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}  # the last as Python's
    for number in signal.valid_signals() - kept:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def lower_limit(kind: int, soft: int, hard: int | None = None) -> None:
    """Set a resource limit, capped at the hard limit in place."""
    _, highest = resource.getrlimit(kind)
    hard = soft if hard is None else hard
    if highest != resource.RLIM_INFINITY:
        soft, hard = min(soft, highest), min(hard, highest)
    resource.setrlimit(kind, (soft, hard))


_LANDLOCK_READ = 0b1101  # execute, read files, list folders
_LANDLOCK_WRITE_FILE = 0b10
_LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of rights on files, by version
_LANDLOCK_ON_FILES = 0b111  # those of them that a rule on a file may name


def landlock_version() -> int:
    """Return the version of Landlock that the kernel has. OSError if it has none."""
    return _syscall("landlock_create_ruleset", None, 0, 1)


def landlock(readable: list[str], devices: list[str]) -> None:
    """Restrict this process to reading these paths and all below, and writing to these devices."""

    class Ruleset(ctypes.Structure):
        _fields_ = tuple((name, ctypes.c_uint64) for name in ("files", "network", "scoped"))

    class Rule(ctypes.Structure):
        _fields_ = (("rights", ctypes.c_uint64), ("folder", ctypes.c_int32))

    version = landlock_version()
    all_rights = (1 << _LANDLOCK_RIGHTS.get(version, 16)) - 1
    network, scoped = 0b11 * (version >= 4), 0b11 * (version >= 6)
    ruleset = Ruleset(all_rights, network, scoped)
    size = 8 if version < 4 else 16 if version < 6 else 24
    handle = _syscall("landlock_create_ruleset", ctypes.byref(ruleset), size, 0)
    try:
        writable = dict.fromkeys(devices, _LANDLOCK_WRITE_FILE)
        for path in [*readable, *devices]:
            rights = _LANDLOCK_READ | writable.get(path, 0)
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not os.path.isdir(path):
                rights &= _LANDLOCK_ON_FILES
            rule = Rule(rights, descriptor)
            _syscall("landlock_add_rule", handle, 1, ctypes.byref(rule), 0)
            os.close(descriptor)
        _syscall("landlock_restrict_self", handle, 0)
    finally:
        os.close(handle)
