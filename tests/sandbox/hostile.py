"""Programs that try to get out, to cheat, to stay, or to bring the machine down, by category.

`REFUSED`: statements that must raise OSError, or ValueError for limits.
`SCRATCH`: statements about files, allowed where there is a private folder and refused elsewhere.
`FULL`: statements that go beyond a private folder, refused everywhere.
`ENDED`: programs and the status that they end with.
`HARMLESS`: programs that may do as they like with their own process, and what they then print.
"""

MODULES = ("ctypes", "os", "resource", "socket", "subprocess", "sys", "tempfile", "time")
BY_NUMBER = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def must(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
"""


def prelude(statement: str) -> str:
    """The imports that a statement needs."""
    used = [f"import {module}\n" for module in MODULES if f"{module}." in statement]
    return "".join(used) + BY_NUMBER * ("must(" in statement)


REFUSED = {
    # Reading the machine
    "read passwd": "open('/etc/passwd').read()",
    "read shadow": "open('/etc/shadow').read()",
    "read hostname": "open('/etc/hostname').read()",
    "read in root's home": "open('/root/.profile').read()",
    "list homes": "os.listdir('/home')",
    "list the caller's folder": "os.listdir({cwd!r})",
    "read this file": "open({this_file!r}).read()",
    "read kernel messages": "open('/dev/kmsg').read(1)",
    "list /sys": "os.listdir('/sys/kernel')",
    "list /run": "os.listdir('/run')",
    "list /var": "os.listdir('/var/log')",
    "list sockets": "open('/proc/net/tcp').read()",
    "read own memory by name": "open('/proc/self/mem', 'rb')",
    "read own maps": "open('/proc/self/maps').read()",
    "read environment of process 1": "open('/proc/1/environ').read()",
    "read the caller's environment": "open('/proc/{pid}/environ').read()",
    "read the caller's memory": "open('/proc/{pid}/mem', 'rb')",
    "read the caller's open files": "os.listdir('/proc/{pid}/fd')",
    "climb out by dots": "open('../../../../../../etc/passwd').read()",
    "open the root folder's parent": "os.listdir('/..' + {cwd!r})",
    "read a disk": "open('/dev/vda', 'rb').read(1)",
    "open the terminal": "open('/dev/tty')",
    "open a handle": "must(libc.open_by_handle_at(-100, b'', 0))",
    # Writing to the machine
    "write into the caller's folder": "open({cwd!r} + '/posttrain_left', 'w')",
    "write into /usr": "open('/usr/posttrain_left', 'w')",
    "write into the root": "open('/posttrain_left', 'w')",
    "write into /dev": "open('/dev/posttrain_left', 'w')",
    "write into /var/tmp": "open('/var/tmp/posttrain_left', 'w')",
    "append to Python's library": "open(os.__file__, 'a')",
    "truncate Python's library": "os.truncate(os.__file__, 0)",
    "open for truncation": "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "remove Python's library": "os.unlink(os.__file__)",
    "rename Python's library": "os.rename(os.__file__, os.__file__ + 'x')",
    "change permissions": "os.chmod(os.__file__, 0o777)",
    "change times": "os.utime(os.__file__)",
    "change owner": "os.chown(os.__file__, os.getuid(), os.getgid())",
    "set attributes": "os.setxattr(os.__file__, 'user.x', b'1')",
    "make a device": "os.mknod('zero', 0o666 | 0o020000, os.makedev(1, 5))",
    "write a disk": "open('/dev/vda', 'wb')",
    "flush all disks": "must(libc.syncfs(1))",
    "lock a file of the machine": "__import__('fcntl').flock(open(os.__file__), 2)",
    # Processes and signals
    "fork": "os.fork()",
    "vfork by number": "must(libc.syscall({vfork}, 17, 0, 0, 0, 0))",
    "clone3": "must(libc.syscall(435, 0, 0))",
    "fork by multiprocessing": "__import__('multiprocessing').Process(target=int).start()",
    "execute": "os.execv('/bin/true', ['true'])",
    "execute a shell": "subprocess.run(['/bin/sh', '-c', 'true'])",
    "execute Python again": "os.execv(sys.executable, [sys.executable, '-c', ''])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {{}})",
    "open a pipe to a shell": "os.popen('true')",
    "signal the caller": "os.kill({pid}, 9)",
    "signal everybody": "os.kill(-1, 9)",
    "signal a thread of the caller": "must(libc.tgkill({pid}, {pid}, 9))",
    "send signals by a pipe": "__import__('fcntl').fcntl(os.pipe()[0], 8, {pid})",
    "open a process": "os.pidfd_open({pid})",
    "trace the caller": "must(libc.ptrace(16, {pid}, 0, 0))",
    "trace itself": "must(libc.ptrace(0, 0, 0, 0))",
    "read the caller's memory by call": "must(libc.process_vm_readv({pid}, 0, 0, 0, 0, 0))",
    "change the caller's limits": "resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
    "change the caller's priority": "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "change the caller's processors": "os.sched_setaffinity({pid}, {{0}})",
    "become real-time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))",
    # Network and other lines to the outside
    "internet socket": "socket.socket()",
    "resolve a name": "socket.getaddrinfo('example.org', 80)",
    "connect to the caller": "socket.create_connection(('127.0.0.1', {port}), 2)",
    "datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "IPv6": "socket.socket(socket.AF_INET6)",
    "unix socket": "socket.socket(socket.AF_UNIX)",
    "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "virtual machine socket": "socket.socket(socket.AF_VSOCK)",
    "kernel crypto socket": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "datagram pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "shared memory": "must(libc.shmget(0x7074, 4096, 0o1666))",
    "semaphores": "must(libc.semget(0x7074, 1, 0o1666))",
    "message queue": "must(libc.msgget(0x7074, 0o1666))",
    "keyring": "must(libc.syscall({add_key}, b'user', b'x', b'y', 1, -4))",
    # Privileges
    "become root": "os.setuid(0)",
    "become another user": "os.setresuid(1234, 1234, 1234)",
    "change groups": "os.setgroups([0])",
    "change root": "os.chroot('/usr')",
    "mount": "must(libc.mount(b'tmpfs', b'/usr', b'tmpfs', 0, 0))",
    "make it writable": "must(libc.mount(b'', b'/usr', b'', 0x1020, 0))",
    "unmount": "must(libc.umount2(b'/usr', 2))",
    "new user namespace": "must(libc.unshare(0x10000000))",
    "join a namespace": "must(libc.setns(0, 0))",
    "set the host name": "socket.sethostname('pwned')",
    "set the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "raise a limit": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "survive the worker": "must(libc.prctl(1, 0, 0, 0, 0))",
    "become dumpable": "must(libc.prctl(4, 1, 0, 0, 0))",
    "add a filter": "must(libc.prctl(22, 2, 0, 0, 0))",
    "personality": "must(libc.personality(0x0040000))",
    "io_uring": "must(libc.syscall(425, 1, 0))",
    "bpf": "must(libc.syscall({bpf}, 0, 0, 0))",
    "userfaultfd": "must(libc.syscall({userfaultfd}, 0))",
    "performance events": "must(libc.syscall({perf_event_open}, 0, 0, 0, 0, 0))",
    "memory without a limit": "os.memfd_create('x')",
    "a terminal's input": "__import__('fcntl').ioctl(0, 0x5412, b'x')",
    "load a module": "must(libc.syscall({init_module}, 0, 0, b''))",
    "reboot": "must(libc.reboot(0x1234567))",
}

SCRATCH = {
    "write a file": "open('x', 'w').write('x' * 1000)",
    "make folders": "os.makedirs('a/b/c')",
    "temporary file": "tempfile.NamedTemporaryFile().write(b'x')",
    "symlink out": "os.symlink('/etc/passwd', 'link')",
    "fill a folder": "[open(str(i), 'w') for i in range(50)]",
}

# In a private folder the private folder's limits hold.
FULL = {
    "huge file": "open('x', 'wb').write(bytes(1 << 20) * 40)",
    "many large files": "[open(str(i), 'wb').write(bytes(4 << 20)) for i in range(10)]",
    "many files": "[open(str(i), 'w').close() for i in range(100_000)]",
    "follow a symlink out": "os.symlink('/etc/passwd', 'link'); open('link').read()",
    "hard link out": "os.link(os.__file__, 'link')",
    "sparse giant": "os.truncate(os.open('x', os.O_CREAT | os.O_RDWR), 1 << 40)",
}

ENDED = {
    "sleep": ("import time; time.sleep(60)", "timeout"),
    "sleep on input": ("import select; select.select([], [], [], 60)", "timeout"),
    "deadlock": ("import threading; a = threading.Lock(); a.acquire(); a.acquire()", "timeout"),
    "never-ending thread": (
        "import threading, time; threading.Thread(target=time.sleep, args=[60]).start()",
        "timeout",
    ),
    "ignore signals and sleep": (
        "import signal, time\n"
        "for n in range(1, 65):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "time.sleep(60)",
        "timeout",
    ),
    "exit handler that hangs": ("import atexit, time; atexit.register(time.sleep, 60)", "timeout"),
    "stop itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "regex that explodes": ("import re; re.match(r'(a+)+$', 'a' * 40 + 'b')", "timeout"),
    "huge power": ("x = 9 ** 9 ** 9", "timeout"),
    "sum of everything": ("sum(range(10 ** 12))", "timeout"),
    "big list": ("x = [0] * (1 << 34)", "memory"),
    "growing list": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    "growing string": ("x = 'x'\nwhile True: x += x", "memory"),
    "memory in a mapping": ("import mmap; mmap.mmap(-1, 1 << 40)", "error"),
    "exit 0 early": ("import sys; sys.exit(0)", "ok"),
    "exit 3": ("import sys; sys.exit(3)", "error"),
    "exit with words": ("import sys; sys.exit('no')", "error"),
    "_exit 0": ("import os; os._exit(0)", "ok"),
    "_exit 1": ("import os; os._exit(1)", "error"),
    "raise SystemExit in a thread": (
        "import threading, sys; threading.Thread(target=sys.exit, args=[5]).start()",
        "ok",
    ),
    "assertion": ("assert False", "error"),
    "syntax": ("def (:", "error"),
    "null byte": ("x = 1\0", "error"),
    "lone surrogate": ("x = '\udc00'", "error"),
    "recursion": ("def f(): f()\nf()", "error"),
    "recursion without a limit": (
        "import sys; sys.setrecursionlimit(10 ** 9)\nclass A:\n"
        "    def __repr__(self): return repr(self)\nrepr(A())",
        ("killed", "memory", "error"),
    ),
    "kill itself": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed"),
    "terminate itself": ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "killed"),
    "alarm": ("import signal, time; signal.setitimer(0, 0.05); time.sleep(60)", "killed"),
    "abort": ("import os; os.abort()", "killed"),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", "killed"),
    "jump to nowhere": ("import ctypes; ctypes.CFUNCTYPE(None)(1)()", "killed"),
    "close everything": ("import os; os.closerange(0, 1000); print('x')", "error"),
    "read no input": ("input()", "error"),
}

HARMLESS = {
    "patched builtins": (
        "import builtins\nbuiltins.len = lambda x: 42\nprint(len([]))",
        "42\n",
    ),
    "patched int by ctypes": (
        "import ctypes\nx = 1000003\nctypes.c_char.from_address(id(x) + 24).value = b'\\0'\n"
        "print(x != 1000003 or x == 1000003)",
        "True\n",
    ),
    "walk frames": (
        "import sys\nframe, found = sys._getframe(), []\nwhile frame:\n"
        "    found += [n for n in frame.f_locals if 'expect' in n or 'stdout' in n]\n"
        "    frame = frame.f_back\nprint(found)",
        "[]\n",
    ),
    "search objects": (
        "import gc\nprint([o for o in gc.get_objects() if type(o) is dict and 'expected' in o])",
        "[]\n",
    ),
    "find descriptors": (
        "import os\nfound = []\nfor n in range(3, 4096):\n    try: found.append(os.fstat(n))\n"
        "    except OSError: pass\nprint(found)",
        "[]\n",
    ),
    "environment": ("import os; print(dict(os.environ))", "{}\n"),
    "command line": ("import sys; print(sys.argv)", "['solution.py']\n"),
    "our modules": (
        "import sys; print([m for m in sys.modules if 'posttrain' in m])",
        "[]\n",
    ),
    "our package": (
        "try:\n    import posttrain\nexcept ImportError:\n    print('none')",
        "none\n",
    ),
    "site-packages": (
        "try:\n    import numpy, pip\nexcept ImportError:\n    print('none')",
        "none\n",
    ),
    "capabilities": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nheader = (ctypes.c_uint32 * 2)(0x20080522, 0)\n"
        "data = (ctypes.c_uint32 * 6)()\nprint(libc.capget(header, data), list(data))",
        "0 [0, 0, 0, 0, 0, 0]\n",
    ),
    "second program in the memory": (
        "print(any('second program' in str(o) for o in globals().values()))",
        "False\n",
    ),
    "own stream for output": (
        "import os\nout = os.fdopen(1, 'w')\nprint('buffered', file=out)",
        "buffered\n",
    ),
    "exit in an exception handler": (
        "import sys\nsys.excepthook = lambda *a: print('hooked')\nraise ValueError",
        "hooked\n",
    ),
    "replaced output": (
        "import sys, io\nsys.stdout.write('x\\n')\nsys.stdout = io.StringIO()\nprint('lost')",
        "x\n",
    ),
    "closed output": ("import sys; print('x', flush=True); sys.stdout = None", "x\n"),
    "pair of sockets": (
        "import socket\na, b = socket.socketpair()\na.send(b'x')\nprint(b.recv(1))",
        "b'x'\n",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(8) as pool: print(sum(pool.map(int, '12345')))",
        "15\n",
    ),
    "memory beside threads": (
        "import threading, time\n"
        "def work():\n    x = [str(i) for i in range(1000)]\n    time.sleep(0.1)\n"
        "for _ in range(4): threading.Thread(target=work).start()\n"
        "print(len(bytearray(100 << 20)))",
        "104857600\n",
    ),
    "event loop": (
        "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 7\n"
        "print(asyncio.run(f()))",
        "7\n",
    ),
    "deep recursion, caught": (
        "def f(n): return f(n + 1)\ntry: f(0)\nexcept RecursionError: print('caught')",
        "caught\n",
    ),
    "deep recursion, allowed": (
        "import sys\nsys.setrecursionlimit(60_000)\n"
        "def f(n): return 0 if not n else 1 + f(n - 1)\nprint(f(50_000))",
        "50000\n",
    ),
    "deep recursion through C": (
        "import sys\nfrom functools import lru_cache\nsys.setrecursionlimit(100_000)\n"
        "@lru_cache(None)\ndef f(n): return 0 if not n else 1 + f(n - 1)\n"
        "try: print(f(25_000))\nexcept RecursionError: print(25_000)  # newer ones count C calls",
        "25000\n",
    ),
    "memory, caught": (
        "try: x = bytearray(1 << 40)\nexcept MemoryError: print('caught')",
        "caught\n",
    ),
    "a main block": ("if __name__ == '__main__': print('main')", "main\n"),
    "devices": (
        "open('/dev/null', 'r+b', buffering=0).write(b'x')\n"
        "print(len(open('/dev/urandom', 'rb').read(3)), open('/dev/zero', 'rb').read(1))",
        "3 b'\\x00'\n",
    ),
}
