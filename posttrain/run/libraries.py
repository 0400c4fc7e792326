"""Import torch and transformers at the least cost.

    load_libraries("torch", "transformers.trainer")

Some 400,000 objects come with them, which live as long as the process. Python's garbage collector
waits until all are there, and leaves them out from then on: it would look through them several
times while they are made, and in each of its full collections, as accelerate asks for.

Packages of LAZY are loaded by the first use of something in them, not by the import statement:
PEFT, which transformers' Trainer imports, imports bitsandbytes only to have it at hand, and
bitsandbytes imports torch's compiler. accelerate would import DeepSpeed, where it is installed, to
ask whether a model is one of its engines; none is before something else has imported it.
"""

from __future__ import annotations

import gc
import importlib
import sys
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from operator import contains

LAZY = ("bitsandbytes",)


class _LazyFinder(MetaPathFinder):
    """Finds the packages of LAZY with Python's own LazyLoader around their loader."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name) if name in LAZY else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def load_libraries(*names: str) -> None:
    """Import the modules of these names, and leave what is there then out of collections."""
    if not any(isinstance(finder, _LazyFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LazyFinder())
    if all(name in sys.modules for name in names):
        return
    was_on = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        if was_on:
            gc.enable()
    if unwrapping := sys.modules.get("accelerate.utils.other"):
        unwrapping.is_deepspeed_available = partial(contains, sys.modules, "deepspeed")
    gc.freeze()
