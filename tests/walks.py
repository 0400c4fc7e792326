"""Which of our modules a run enters: what a reader has to open to follow it.

    with entered_modules() as modules:
        dpo.main(config)
    assert len(modules) <= 25, shown(modules)

A module is entered if a function of it is called; importing it does not count, nor does what its
body calls while it is imported. Counted are modules of posttrain and recipes, in the order in which
they are entered, in all threads of this process, but not in child processes.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / part) + "/" for part in ("posttrain", "recipes"))
IS_FUNCTION = inspect.CO_NEWLOCALS  # not set for the bodies of modules and classes
IMPORT = "<frozen importlib"  # the file name of the frames that import a module


@contextmanager
def entered_modules() -> Iterator[dict[str, set[str]]]:
    """Fill {module path from the root: names of functions called} while the block runs."""
    with _profiled("call", lambda _frame: True) as modules:
        yield modules


@contextmanager
def modules_that_see(values: Sequence[object]) -> Iterator[dict[str, set[str]]]:
    """Count only functions with a variable that is one of the values, or a dict or partial with it.

    A function that passes on a whole object of settings does not see what it holds.
    """

    def is_seen(value: object) -> bool:
        return type(value) in (str, float) and value in values

    def sees(frame: FrameType) -> bool:
        for variable in list(frame.f_locals.values()):
            inside = variable.keywords if isinstance(variable, partial) else variable
            found = list(inside.values()) if type(inside) is dict else [inside]
            if any(map(is_seen, found)):
                return True
        return False

    with _profiled("return", sees) as modules:
        yield modules


@contextmanager
def _profiled(moment: str, is_wanted: Callable[[FrameType], bool]) -> Iterator[dict[str, set[str]]]:
    modules: dict[str, set[str]] = {}
    seen: set[CodeType] = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != moment or code in seen or not code.co_filename.startswith(OURS):
            return
        if not code.co_flags & IS_FUNCTION or not is_wanted(frame) or _is_importing(frame):
            return
        seen.add(code)
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


def _is_importing(frame: FrameType | None) -> bool:
    """True where the frame was called, through others perhaps, by the body of a module."""
    while frame is not None and not frame.f_code.co_filename.startswith(IMPORT):
        frame = frame.f_back
    return frame is not None


def shown(modules: dict[str, set[str]]) -> str:
    """List the modules with their functions, one module a line, in the order entered."""
    lines = [f"{path}: {', '.join(sorted(names))}" for path, names in modules.items()]
    return "\n".join([f"{len(modules)} modules entered:", *lines])
