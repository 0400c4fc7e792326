"""Counts of each kind of verdict in this process, its reward workers included.

    count("refused")
    take()                # Counter({"refused": 1}), and counting starts again

Rewards that judge by rules count the kind of each verdict here. An answer that is refused, or that
takes too long, scores 0 like any wrong answer, and only these counts tell them apart.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

_counts: Counter[str] = Counter()
_lock = threading.Lock()


def count(kind: str) -> None:
    """Count one verdict of this kind."""
    with _lock:
        _counts[kind] += 1


def add(counts: Mapping[str, int]) -> None:
    """Add the counts of another process."""
    with _lock:
        _counts.update(counts)


def take() -> Counter[str]:
    """Return the counts since the last call, and start again at zero."""
    with _lock:
        taken = Counter(_counts)
        _counts.clear()
    return taken
