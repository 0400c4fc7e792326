"""Import torch and transformers at the least cost.

    load_libraries("torch", "transformers.trainer")

Half a million objects come with them, and none of them is garbage: the collector, which would look
through them again and again, waits until all are there. Packages of LAZY are loaded by the first
use of something in them instead of by the import statement: PEFT, which transformers' Trainer
imports, imports bitsandbytes only to have it at hand, and that imports torch's compiler.
"""

from __future__ import annotations

import gc
import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader

LAZY = ("bitsandbytes",)


class _LazyFinder(MetaPathFinder):
    """Finds the packages of LAZY with Python's own LazyLoader around their loader."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name) if name in LAZY else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def load_libraries(*names: str) -> None:
    """Import the modules of these names, without collecting garbage meanwhile."""
    if not any(isinstance(finder, _LazyFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LazyFinder())
    was_on = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        if was_on:
            gc.enable()
