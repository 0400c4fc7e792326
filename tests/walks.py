"""Which of our modules a run enters: what a reader has to open to follow it.

    with entered_modules() as modules:
        dpo.main(config)
    assert len(modules) <= 25, shown(modules)

A module is entered if a function of it is called; importing it does not count. Counted are modules
of posttrain and recipes, in all threads of this process, but not in child processes.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / part) + "/" for part in ("posttrain", "recipes"))
IS_FUNCTION = inspect.CO_NEWLOCALS  # not set for the bodies of modules and classes


@contextmanager
def entered_modules() -> Iterator[dict[str, set[str]]]:
    """Fill {module path from the root: names of functions called} while the block runs."""
    modules: dict[str, set[str]] = {}

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(OURS):
            return
        if not code.co_flags & IS_FUNCTION:
            return
        path = str(Path(code.co_filename).relative_to(ROOT))
        modules.setdefault(path, set()).add(getattr(code, "co_qualname", code.co_name))

    before = sys.getprofile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield modules
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


def shown(modules: dict[str, set[str]]) -> str:
    """List the modules with their functions, one module a line."""
    lines = [f"{path}: {', '.join(sorted(names))}" for path, names in sorted(modules.items())]
    return "\n".join([f"{len(modules)} modules entered:", *lines])
