"""Output for the person at the keyboard, from one process only. It needs no torch."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD128")


def is_main_process() -> bool:
    """Return True on rank 0 of the launch, and if nothing was launched."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print a line at once, on the main process only."""
    if is_main_process():
        print(text, flush=True)


def set_up_libraries() -> None:
    """Quiet the libraries below to errors, and ask torch for large memory pages.

    Programs call it before they import transformers. Variables that the user has set stay.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars heed it too
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Fresh pages of 4 KiB can take a third of a step's time on a CPU; Linux only.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not any(Path(device).exists() for device in GPU_DEVICES):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed so
    # PEFT imports bitsandbytes wherever it is installed, and that one misses a package on CPUs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:  # libraries tell each other what they will rename, at every step
        warnings.simplefilter("ignore", FutureWarning)


def describe_duration(seconds: float) -> str:
    """Format a duration as `01:12`, or from an hour on as `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
