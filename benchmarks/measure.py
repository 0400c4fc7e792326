"""Measure inside a process: clocks, peak memory, metrics of the first step, the product rate.

CPU seconds are the process's own, of all its threads. Peak memory is the high-water mark of the
resident set since the program began (`VmHWM`), or what CUDA's allocator held at most.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from posttrain.run.engine import this_device

SHAPES = ((2048, 512, 1280), (2048, 512, 16_384), (1024, 1024, 1024), (2048, 2048, 2048))
SECONDS_PER_SHAPE = 0.6
PRODUCTS_AT_ONCE = 5


class Clock:
    """CPU and wall seconds between start and stop; several spans add up."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def start(self) -> None:
        """Begin a span."""
        _synchronize()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """End a span, and add it."""
        _synchronize()
        self.cpu += time.process_time() - self._cpu
        self.wall += time.perf_counter() - self._wall

    def times(self, share: float) -> "Clock":
        """Return a stopped clock that shows this share of this one's seconds."""
        clock = Clock()
        clock.cpu, clock.wall = self.cpu * share, self.wall * share
        return clock

    def __enter__(self) -> "Clock":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class StepMeter(TrainerCallback):
    """Times the optimizer steps after the warm-up, and keeps what is logged of the first step."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps, self.clock = warmup_steps, Clock()
        self.first_log: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **_):  # noqa: ARG002
        if not self.warmup_steps:
            self.clock.start()

    def on_step_end(self, args, state, control, **_):  # noqa: ARG002
        if state.global_step == self.warmup_steps:
            self.clock.start()
        if state.global_step == state.max_steps:
            self.clock.stop()

    def on_log(self, args, state, control, logs=None, **_):  # noqa: ARG002
        self.first_log = self.first_log or dict(logs)


def result(meter: StepMeter, *, first: dict[str, str], before: Clock | None = None) -> dict:
    """Return the result of a finished run.

    Args:
        first: Name in its log -> name for both sides.
        before: The time of work that belongs to the measured steps and was done ahead of them.
    """
    before = before or Clock()
    return {
        "cpu_seconds": meter.clock.cpu + before.cpu,
        "wall_seconds": meter.clock.wall + before.wall,
        "peak_gb": peak_gigabytes(),
        "first": {name: float(meter.first_log[key]) for key, name in first.items()},
    }


def peak_gigabytes() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count the parent's memory before exec as ours
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def product_rates(_job: object) -> dict[str, Any]:
    """Measure GFLOP a second in matrix products, the best of a few shapes such as training has.

    Seconds are of this process's CPU time, which other processes on the machine disturb least; on
    a GPU they are of the clock. `clock` names the measure of a run that they belong to.
    """
    gflops = {
        name: max(_rate(getattr(torch, name), *shape) for shape in SHAPES)
        for name in ("float32", "bfloat16")
    }
    return {
        "gflops": gflops,
        "clock": "wall_seconds" if this_device().type == "cuda" else "cpu_seconds",
    }


def _rate(dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    device = this_device()
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    left @ right.T
    clock, count = Clock(), 0
    while clock.wall < SECONDS_PER_SHAPE:
        with clock:  # which waits for a GPU
            for _ in range(PRODUCTS_AT_ONCE):
                left @ right.T
        count += PRODUCTS_AT_ONCE
    seconds = clock.wall if device.type == "cuda" else clock.cpu
    return 2 * rows * inner * columns * count / seconds / 1e9


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
