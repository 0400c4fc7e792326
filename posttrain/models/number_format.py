"""The number format that a CPU trains a model in, where `--dtype auto` leaves it open: measured.

    settle_dtype(config)     # by recipes/common.py

Processors with instructions for bfloat16 multiply several times faster in it, and those without
them several times slower. So one product of the model's own width is timed in both, casts
included, and the answer is kept for this processor.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
import yaml

from posttrain.models.load import place_of
from posttrain.models.lora import base_of
from posttrain.run.engine import cpu_name, this_device
from posttrain.run.folder import write_whole
from posttrain.run.options import say

TOKENS, ROUNDS = 512, 7
# bfloat16 rounds coarsely, so it has to be clearly faster.
WORTH = 0.7


class Settings(Protocol):
    """The settings that are read here."""

    model_name_or_path: str
    dtype: str
    output_dir: str
    resume: bool


def settle_dtype(config: Settings) -> None:
    """Replace `auto` by "bfloat16" or "float32" on a CPU, and say so; a resumed run keeps its own.

    It stays on a GPU, whose kind decides, and on several ranks, which could measure differently;
    and for a model whose config cannot be read: loading it says what is wrong.
    """
    saved = Path(config.output_dir) / "config.yaml"
    if config.resume and saved.is_file():
        config.dtype = yaml.safe_load(saved.read_text(encoding="utf-8"))["dtype"]
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or this_device().type != "cpu":
        return
    if (shape := _shape_of(config.model_name_or_path)) is None:
        return
    share = bfloat16_share(*shape)
    config.dtype = "bfloat16" if share < WORTH else "float32"
    say(
        f"dtype   {config.dtype}: a product in bfloat16 takes {share:.2f} of its time in float32 "
        "here (--dtype names another)"
    )


def bfloat16_share(hidden: int, intermediate: int) -> float:
    """Seconds of a linear layer in bfloat16 over those in float32, measured once a processor."""
    place, key = _cache_path(), f"{cpu_name()}; {torch.__version__}; {hidden}x{intermediate}"
    known = _read(place)
    if key not in known:
        known[key] = _measure(hidden, intermediate)
        with suppress(OSError):  # without a home it is measured each time
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, json.dumps(known, indent=1))
    return known[key]


def _shape_of(name: str) -> tuple[int, int] | None:
    from transformers import AutoConfig

    try:
        place, settings = place_of(base_of(name))
        config = AutoConfig.from_pretrained(place, **settings).get_text_config()
    except Exception:  # whatever is wrong, loading the model says it
        return None
    hidden, inner = (getattr(config, f"{part}_size", None) for part in ("hidden", "intermediate"))
    if not isinstance(hidden, int):
        return None
    return hidden, inner if isinstance(inner, int) else 4 * hidden  # one for each layer: a list


def _measure(hidden: int, intermediate: int) -> float:
    states, weight = torch.randn(TOKENS, hidden), torch.randn(intermediate, hidden)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where another process holds a core
    for _ in range(ROUNDS):
        for dtype, times in seconds.items():
            start = time.process_time()
            states.to(dtype) @ weight.to(dtype).T
            times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return min(seconds[torch.bfloat16]) / min(seconds[torch.float32])


def _cache_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache)) / "posttrain" / "bfloat16.json"


def _read(path: Path) -> dict[str, float]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = known if isinstance(known, dict) else {}
    return {key: share for key, share in known.items() if isinstance(share, float)}
