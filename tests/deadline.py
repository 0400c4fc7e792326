"""A generous deadline, so that a test that hangs fails and says where. It measures nothing."""

import contextlib
import signal


class Hangs(BaseException):
    """The deadline has passed. No `except Exception` of the code under test catches it."""


@contextlib.contextmanager
def deadline(seconds, what=""):
    """Raise `Hangs` in the main thread after this time, also within a regular expression."""

    def stop(*_):
        raise Hangs(f"not done after {seconds} s: {what!r:.100}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
