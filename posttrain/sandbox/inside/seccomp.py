"""The system calls that untrusted code may make, as a program for the kernel's seccomp filter.

    pack(build_filter(platform.machine(), allow_subprocess=False, writable=True))

The filter is an allow list: a call that is not named is refused, so a call that a later kernel adds
is refused as well. A refused call fails with EPERM, which Python shows as PermissionError. A call
that is newer than this file, and clone3, whose arguments a filter cannot see, fail with ENOSYS, so
that libc falls back to the older call. The instruction set of another machine kills the process.

A filter is a list of (code, jump if true, jump if false, constant), the classic BPF of
linux/filter.h, over struct seccomp_data: number, architecture, instruction pointer, six arguments.

The tables list the calls as `name:x86_64:aarch64`, with "-" where the architecture has no such
call. These numbers are the kernel's interface and never change.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable

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


NEWEST = 452  # the newest call named here; numbers above it are unknown to this file

# Calls that use descriptors, and files that the tier lets the code open.
READING = """
    read:0:63 write:1:64 close:3:57 lseek:8:62 pread64:17:67 pwrite64:18:68 readv:19:65
    writev:20:66 preadv:295:69 pwritev:296:70 preadv2:327:286 pwritev2:328:287 open:2:-
    openat:257:56 stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 access:21:-
    faccessat:269:48 faccessat2:439:439 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49
    fchdir:81:50 readlink:89:- readlinkat:267:78 dup:32:23 dup2:33:- dup3:292:24 pipe:22:-
    pipe2:293:59 poll:7:- ppoll:271:73 select:23:- pselect6:270:72 fsync:74:82 fdatasync:75:83
    sendfile:40:71 copy_file_range:326:285 statfs:137:43 fstatfs:138:44 umask:95:166
    close_range:436:436 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
    epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 eventfd2:290:19 signalfd4:289:74
    timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
"""

# Memory, threads, time, and the process's own signals and identity.
ONE_PROCESS = """
    mmap:9:222 munmap:11:215 mprotect:10:226 mremap:25:216 madvise:28:233 brk:12:214
    msync:26:227 membarrier:324:283 rseq:334:293 futex:202:98 futex_waitv:449:449
    set_robust_list:273:99 set_tid_address:218:96 gettid:186:178 getpid:39:172 getppid:110:173
    getpgid:121:155 getpgrp:111:- getsid:124:156 sched_yield:24:124 sched_getaffinity:204:123
    sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
    sched_get_priority_min:147:126 getpriority:140:141 getcpu:309:168 nanosleep:35:101
    clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169
    time:201:- times:100:153 getitimer:36:102 setitimer:38:103 alarm:37:- pause:34:-
    restart_syscall:219:128 exit:60:93 exit_group:231:94 rt_sigaction:13:134
    rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigsuspend:130:133
    rt_sigtimedwait:128:137 sigaltstack:131:132 getuid:102:174 geteuid:107:175 getgid:104:176
    getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 uname:63:160
    sysinfo:99:179 getrusage:98:165 getrlimit:97:163 getrandom:318:278 arch_prctl:158:-
    wait4:61:260 waitid:247:95 capget:125:90 sendto:44:206 recvfrom:45:207 shutdown:48:210
    getsockname:51:204 getpeername:52:205 getsockopt:55:209
"""

# Calls that change files by name, or their attributes. Landlock does not restrict chmod, utime and
# xattr, so this group is left out where the files of the machine are in sight.
WRITING = """
    creat:85:- truncate:76:45 ftruncate:77:46 fallocate:285:47 rename:82:- renameat:264:38
    renameat2:316:276 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 link:86:-
    linkat:265:37 symlink:88:- symlinkat:266:36 chmod:90:- fchmod:91:52 fchmodat:268:53
    fchmodat2:452:452 utime:132:- utimes:235:- utimensat:280:88 futimesat:261:- getxattr:191:8
    lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12 flistxattr:196:13
    setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14 lremovexattr:198:15
    fremovexattr:199:16
"""

# Calls added by `allow_subprocess`.
SUBPROCESS = """
    execve:59:221 execveat:322:281 fork:57:- vfork:58:- setsid:112:157 setpgid:109:154
    pidfd_open:434:434 pidfd_send_signal:424:424
"""

# Calls allowed for some arguments only: see `_by_argument`.
BY_ARGUMENT = """
    clone:56:220 clone3:435:435 socketpair:53:199 prctl:157:167 ioctl:16:29 fcntl:72:25
    kill:62:129 tgkill:234:131 prlimit64:302:261
"""

# Calls that `kernel` makes by number before the filter is in place; the filter refuses them.
OUR_OWN = """
    pivot_root:155:41 mount_setattr:442:442 capset:126:91 landlock_create_ruleset:444:444
    landlock_add_rule:445:445 landlock_restrict_self:446:446
"""

_COLUMNS = {"x86_64": 1, "aarch64": 2}
ARCHITECTURES = tuple(_COLUMNS)


def numbers(group: str, machine: str) -> dict[str, int]:
    """Return name and number of each call of `group` that `machine` has."""
    entries = [entry.split(":") for entry in group.split()]
    column = _COLUMNS[machine]
    return {entry[0]: int(entry[column]) for entry in entries if entry[column] != "-"}


def all_numbers(machine: str) -> dict[str, int]:
    """Return name and number of every call that this file names, on `machine`."""
    groups = (READING, ONE_PROCESS, WRITING, SUBPROCESS, BY_ARGUMENT, OUR_OWN)
    return {name: number for group in groups for name, number in numbers(group, machine).items()}


def _argument(index: int) -> Instruction:
    """Load the low half of an argument. Every argument that the rules look at is an int."""
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
    """Build the filter as a list of instructions.

    Args:
        machine: "x86_64" or "aarch64".
        allow_subprocess: Allow fork and exec.
        writable: Allow changes to files. Only for tiers in which the private folder is the only one
            that can be written to.
        signals_to_itself_only: Refuse signals to other processes; `set_process` fills in the id of
            the process itself.
        refuse_truncation: Refuse to open a file with O_TRUNC, which Landlock did not restrict
            before its third version.
    """
    groups = [READING, ONE_PROCESS]
    groups += [WRITING] * writable + [SUBPROCESS] * allow_subprocess
    rules = {name: PERMITTED for group in groups for name in numbers(group, machine)}
    if refuse_truncation:
        rules |= {"open": _if_masked(1, O_TRUNC, 0), "openat": _if_masked(2, O_TRUNC, 0)}
    rules |= _by_argument(
        allow_subprocess=allow_subprocess, signals_to_itself_only=signals_to_itself_only
    )

    by_number = {
        number: rules[name] for name, number in all_numbers(machine).items() if name in rules
    }
    lines: list[Instruction] = [(LOAD, 0, 0, ARCHITECTURE)]
    lines += [(JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL_PROCESS)]
    lines += [(LOAD, 0, 0, NUMBER)]
    for first, last, rule in _ranges(by_number):
        # Ascending, so one jump passes a range over: the kernel walks this for every number.
        lines += [(JUMP_GREATER, len(rule) + 2, 0, last)]
        lines += [(JUMP_GREATER_OR_EQUAL, 1, 0, first), *REFUSED, *rule]
    # The x32 calls of x86_64 have numbers from 1 << 30: they are among the missing ones.
    return [*lines, (JUMP_GREATER, 0, 1, NEWEST), *MISSING, *REFUSED]


def _ranges(rules: dict[int, list[Instruction]]) -> list[tuple[int, int, list[Instruction]]]:
    """Return ascending (first, last, rule), with neighbours of the same rule joined."""
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
    """The kernel's struct sock_fprog.

    It keeps its instructions alive and remembers which of them hold THIS_PROCESS.
    """

    process_lines: list[int]
    _fields_ = (("length", ctypes.c_uint16), ("lines", ctypes.POINTER(_Instruction)))


def pack(lines: list[Instruction]) -> FilterProgram:
    """Pack the instructions into the form that the kernel reads."""
    program = FilterProgram(len(lines), (_Instruction * len(lines))(*lines))
    program.process_lines = [at for at, line in enumerate(lines) if line[3] == THIS_PROCESS]
    return program


def set_process(program: FilterProgram, process: int) -> None:
    """Replace THIS_PROCESS in a packed filter by a process id."""
    for at in program.process_lines:
        program.lines[at].constant = process
