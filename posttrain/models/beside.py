"""Heads that lie beside a saved model, to draft tokens with.

find = heads_beside("runs/medusa/model")       # None where there are none
heads = find(model)                            # posttrain.rollouts.drafts.Heads
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def heads_beside(model_name_or_path: str) -> Callable[[nn.Module], Any] | None:
    """Return what loads the heads of a model's folder; None where it has none.

    Prediction modules under a family's own names are known by the file that recipes/mtp.py writes.
    """
    folder = Path(model_name_or_path)
    if not any((folder / name).is_file() for name in ("heads/config.json", "mtp.safetensors")):
        return None
    from posttrain.heads import load_heads

    return partial(load_heads, model_name_or_path)
