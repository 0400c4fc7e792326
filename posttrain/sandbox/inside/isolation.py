"""Confining a worker before it has seen any untrusted code. Runs inside the worker.

`enter_namespaces` gives a worker its own user, mount, network, IPC, host name and process
namespaces, with a read-only root that holds Python, the system's libraries and three devices.
Each run then adds what must be private to it: see `places`. `enter_landlock` is for kernels or
containers that forbid namespaces.

If the caller is root, the worker first changes to a user id that no account has, so that file
permissions protect the machine as well. Our side uses only `readable_paths` and `SCRATCH`, for the
bubblewrap tier.
"""

from __future__ import annotations

import os
import sys

from posttrain.sandbox.inside import kernel

SCRATCH = "/tmp"
INNER_USER = 1000
FIRST_USER = 1_900_000_000  # plus the worker's process id: an id that no account has
FIRST_IN_CONTAINER = 60_000  # for containers with 65,536 ids
SYSTEM_PATHS = (
    "/usr",
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix/store",
    "/etc/ld.so.cache",
    "/etc/localtime",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def readable_paths() -> list[str]:
    """List the paths that Python needs: itself, its library, and the shared libraries it loads."""
    python = [*sys.path, f"{sys.base_prefix}/lib", sys.executable, os.path.realpath(sys.executable)]
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in maps if "r-xp" in line}
    libraries = sorted(os.path.dirname(path) for path in mapped if path.startswith("/"))
    found: list[str] = []
    for path in [*SYSTEM_PATHS, *python, *libraries]:
        above = any(path == other or path.startswith(other + "/") for other in found)
        if os.path.exists(path) and path != "/" and not above:
            found.append(path)
    return found


def become_other_user() -> None:
    """As root, change to a user id that no account has.

    The process stays root in a container that maps no such id.
    """
    for number in (FIRST_USER + os.getpid(), FIRST_IN_CONTAINER + os.getpid() % 5_000):
        try:
            os.setgroups([])
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
            break
        except OSError:
            continue
    kernel.set_dumpable(True)  # else /proc/self belongs to root


def enter_namespaces() -> int:
    """Move to new namespaces and return as process 1 there.

    The process that called this only waits for that one to end.

    Returns:
        The user id that this process has outside of the namespaces.
    """
    paths = {path: os.path.realpath(path) for path in readable_paths()}
    own_proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    everything = (
        kernel.NEW_USERS | kernel.NEW_MOUNTS | kernel.NEW_NETWORK | kernel.NEW_IPC | kernel.NEW_UTS
    )
    is_root = os.getuid() == 0
    if is_root:
        # Only real root can see a Python below /root, so the tree comes before the other user.
        kernel.unshare(kernel.NEW_MOUNTS)
        build_root(paths)
        become_other_user()
    user, group = os.getuid(), os.getgid()
    kernel.unshare(everything)
    _write(own_proc, "setgroups", "deny")
    _write(own_proc, "uid_map", f"{INNER_USER} {user} 1")
    _write(own_proc, "gid_map", f"{INNER_USER} {group} 1")
    os.close(own_proc)
    if not is_root:
        build_root(paths)
    kernel.unshare(kernel.NEW_PIDS)
    process = os.fork()
    if process:
        os.closerange(0, 1 << 16)
        os.waitpid(process, 0)
        os._exit(0)
    kernel.die_with_parent(0)  # which is how a parent outside of the namespace looks
    return user


def _write(folder: int, name: str, text: str) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def build_root(paths: dict[str, str]) -> None:
    """Make a read-only tree of these paths the root, and detach the old one.

    A first pivot moves the machine's files to /old, so that no mount made on the way hides them.

    Args:
        paths: Path in the new root to its source, a real path of the machine.
    """
    kernel.mount("", "/", flags=kernel.RECURSIVE | kernel.PRIVATE)
    kernel.mount("tmpfs", SCRATCH, "tmpfs", kernel.NOSUID | kernel.NODEV)
    os.mkdir(f"{SCRATCH}/old")
    kernel.pivot_root(SCRATCH, f"{SCRATCH}/old")
    os.chdir("/")
    os.mkdir("/new")
    kernel.mount("tmpfs", "/new", "tmpfs", kernel.NOSUID, "mode=0755")
    for path, source in paths.items():
        _show(f"/old{source}", f"/new{path}", kernel.MOUNT_NODEV)
    for path in DEVICES:
        _show(f"/old{path}", f"/new{path}", kernel.MOUNT_NOEXEC)
    os.makedirs(f"/new{SCRATCH}")
    os.symlink(SCRATCH, "/new/dev/shm")  # what multiprocessing's locks need
    kernel.set_mount_flags("/new", kernel.MOUNT_READ_ONLY | kernel.MOUNT_NOSUID)
    os.chdir("/new")
    kernel.pivot_root(".", ".")
    kernel.detach(".")
    os.chdir("/")


def _show(source: str, target: str, flags: int) -> None:
    if os.path.isdir(source):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.mount(source, target, flags=kernel.BIND | kernel.RECURSIVE)
    kernel.set_mount_flags(target, flags)


def enter_landlock() -> int:
    """Restrict this process to reading Python and the system's libraries.

    Root whose Python lies where only root can read, as below /root, stays root, but without any of
    root's capabilities.

    Returns:
        The user id that this process then has.
    """
    paths = readable_paths()
    if os.getuid() == 0 and _readable_by_others(os.__file__):
        become_other_user()
    kernel.drop_capabilities()
    kernel.forbid_new_privileges()
    kernel.landlock(paths, [path for path in DEVICES if os.path.exists(path)])
    return os.getuid()


def _readable_by_others(path: str) -> bool:
    parent = os.path.dirname(path)
    while parent != "/":
        if not os.stat(parent).st_mode & 0o1:
            return False
        parent = os.path.dirname(parent)
    return bool(os.stat(path).st_mode & 0o4)
