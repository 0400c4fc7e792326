"""What the pool's tests run in workers."""

import os
import time

time.sleep(0.5)  # a slow import, so that a test can see who pays for it
_warmed = []


def warm_up():
    _warmed.append(os.getpid())


def answer(request):
    what, *rest = request
    return _ANSWERS[what](*rest)


def _raise(message):
    raise ValueError(message)


def _sleep(seconds):
    time.sleep(seconds)
    return seconds


def _hang():
    while True:
        pass


_ANSWERS = {
    "echo": lambda value: value,
    "pid": os.getpid,
    "parent": os.getppid,
    "raise": _raise,
    "sleep": _sleep,
    "hang": _hang,
    "exit": lambda: os._exit(1),
    "allocate": lambda size: len(bytearray(size)),
    "object": object,
    "warm": lambda: _warmed,
}
