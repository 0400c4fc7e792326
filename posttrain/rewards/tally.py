"""How often each kind of verdict fell in this process, its reward workers' included.

    count("refused")
    take()                # Counter({"refused": 1}), and from here on anew

Rewards that judge by rules count the kind of each verdict here: what was refused, or ran out of
time, is worth 0 like any wrong answer, and only the counts tell it apart.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

_counts: Counter[str] = Counter()
_lock = threading.Lock()


def count(kind: str) -> None:
    with _lock:
        _counts[kind] += 1


def add(counts: Mapping[str, int]) -> None:
    """What another process counted."""
    with _lock:
        _counts.update(counts)


def take() -> Counter[str]:
    """What was counted since the last time."""
    with _lock:
        taken = Counter(_counts)
        _counts.clear()
    return taken
