"""Words for the person at the keyboard, from one process only."""

import logging
import os
import sys
import warnings
from pathlib import Path

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD128")


def is_main_process() -> bool:
    """Whether this is rank 0 of the launch (true when nothing was launched)."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print on the main process, at once."""
    if is_main_process():
        print(text, flush=True)


def set_up_libraries() -> None:
    """Ask the libraries below for errors only, as a recipe's screen belongs to the recipe, and
    torch for large pages.

    For programs, before they import transformers; what the user has set stays.
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
