"""Numbers of the system calls that are allowed or used here, on x86_64 and aarch64.

Each entry is `name:x86_64:aarch64`, with "-" where the architecture has no such call. The numbers
are the kernel's interface and never change.
"""

from __future__ import annotations

NEWEST = 452  # the newest call named here; numbers above it are unknown to this file

# Using descriptors, and files that the tier lets it open.
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

# Memory, threads, time, its own signals and its own facts.
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

# Files by name or their attributes. Landlock does not know chmod, utime and xattr, so these are
# left out where the files of the machine are in sight.
WRITING = """
    creat:85:- truncate:76:45 ftruncate:77:46 fallocate:285:47 rename:82:- renameat:264:38
    renameat2:316:276 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 link:86:-
    linkat:265:37 symlink:88:- symlinkat:266:36 chmod:90:- fchmod:91:52 fchmodat:268:53
    fchmodat2:452:452 utime:132:- utimes:235:- utimensat:280:88 futimesat:261:- getxattr:191:8
    lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12 flistxattr:196:13
    setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14 lremovexattr:198:15
    fremovexattr:199:16
"""

# With `allow_subprocess`.
SUBPROCESS = """
    execve:59:221 execveat:322:281 fork:57:- vfork:58:- setsid:112:157 setpgid:109:154
    pidfd_open:434:434 pidfd_send_signal:424:424
"""

# Allowed for some arguments only: see `seccomp`.
BY_ARGUMENT = """
    clone:56:220 clone3:435:435 socketpair:53:199 prctl:157:167 ioctl:16:29 fcntl:72:25
    kill:62:129 tgkill:234:131 prlimit64:302:261
"""

# Called by number before the filter is in place; not allowed by it.
OUR_OWN = """
    pivot_root:155:41 mount_setattr:442:442 capset:126:91 landlock_create_ruleset:444:444
    landlock_add_rule:445:445 landlock_restrict_self:446:446
"""

_COLUMNS = {"x86_64": 1, "aarch64": 2}
ARCHITECTURES = tuple(_COLUMNS)


def numbers(group: str, machine: str) -> dict[str, int]:
    """Name and number of each call of a group that `machine` has."""
    entries = [entry.split(":") for entry in group.split()]
    column = _COLUMNS[machine]
    return {entry[0]: int(entry[column]) for entry in entries if entry[column] != "-"}


def all_numbers(machine: str) -> dict[str, int]:
    """Name and number of every call of this file."""
    groups = (READING, ONE_PROCESS, WRITING, SUBPROCESS, BY_ARGUMENT, OUR_OWN)
    return {name: number for group in groups for name, number in numbers(group, machine).items()}
