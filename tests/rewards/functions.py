"""Rewards that the tests send to worker processes, which all import this light module."""

import os
import re
import time
from pathlib import Path

from posttrain.rewards.pieces import per_completion


def where(completions, **_columns):
    return [float(os.getpid()) for _ in completions]


def how_many(completions, **_columns):
    return [float(len(completions)) for _ in completions]


@per_completion
def length(completions, **_columns):
    return [float(len(text)) for text in completions]


def backtracks(completions, **_columns):
    """A regular expression that holds the interpreter's lock for ages: no thread could stop it."""
    return [float(bool(re.fullmatch(r"(a+)+b", text))) for text in completions]


@per_completion
def trips(completions, **_columns):
    """Raises, dies or hangs at the answers that say so."""
    for text in completions:
        if text == "raise":
            raise ValueError("as told")
        if text == "die":
            os._exit(3)
        if text == "hang":
            time.sleep(60)
    return [1.0 for _ in completions]


def odd(**_call):
    return ["high"]


async def awaited(completions, **_columns):
    return [float(len(text)) for text in completions]


def asks_for_the_run(completions, trainer_state):
    return [float(os.getpid()) if trainer_state is None else 0.0 for _ in completions]


def weighs(completions, *, model, **_columns):
    return where(completions) if model else []


def talks(text):
    print("a worker says", text, flush=True)


def makes_a_file(completions, path, **_columns):
    Path(path[0]).touch()
    return [1.0 for _ in completions]
