"""Drawing the next rollout in a thread, while the trainer learns from the last one.

    loader.draw = DrawAhead(loader.draw, freeze=copy_weights, num_rollouts=100)

`draw(n)` then gives rollout n and begins with n + 1, by the weights that `freeze` has just copied.
So which weights draw what does not depend on who is faster: rollout n is drawn by the policy that
learns from rollout n - 1 next, and is stale by that one rollout. A thread, not a process: the
rewards, the data and a copy of the weights are here already, and torch lets others run while it
computes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import DataError
from posttrain.rewards.scoring import Scores
from posttrain.rollouts.rollout import Rollout
from posttrain.rollouts.sampling import Completion

Draw = Callable[[int], list[Rollout]]


class DrawAhead:
    """`draw` that has begun with the next rollout before it is asked for it.

    draw: f(number) -> rollouts; it runs in the thread, by weights that nobody else moves. freeze:
    copies the weights of now for it; called in the caller's thread, while nothing is drawn.
    num_rollouts: none is begun beyond these.
    """

    def __init__(self, draw: Draw, *, freeze: Callable[[], None], num_rollouts: int) -> None:
        self._draw, self._freeze, self._num_rollouts = draw, freeze, num_rollouts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._begun: tuple[int, Future] | None = None

    def __call__(self, number: int) -> list[Rollout]:
        """Rollout `number`. Raises what drawing it raised, with the thread's traceback."""
        if self._begun is None:  # a run's first
            self._begin(number)
        begun, future = self._begun
        if begun != number:
            raise DataError(
                f"expected rollout {number} to have been drawn ahead, found {begun}. Resume from "
                "the checkpoint that it was saved with, with the same --updates_per_rollout."
            )
        start = time.perf_counter()
        rollouts = future.result()
        rollouts[0].seconds["wait"] = time.perf_counter() - start
        self._begun = None
        if number + 1 < self._num_rollouts:
            self._begin(number + 1)
        return rollouts

    def _begin(self, number: int) -> None:
        self._freeze()
        self._begun = number, self._thread.submit(self._draw, number)

    def wait(self) -> None:
        """Return when nothing is being drawn; what was drawn stays for the next call."""
        if self._begun is not None:
            self._begun[1].exception()

    def close(self) -> None:
        """End the thread; a rollout that it is in the middle of is waited for."""
        self._thread.shutdown(cancel_futures=True)

    # Resuming: the rollout that was drawn ahead belongs to weights that are gone by then.

    def save(self, path: Path) -> None:
        """Write the rollout that was drawn ahead, once it is done; no file where there is none."""
        if self._begun is not None:
            number, future = self._begun
            rollouts = [dataclasses.asdict(rollout) for rollout in future.result()]
            torch.save({"number": number, "rollouts": rollouts}, path)

    def load(self, path: Path) -> None:
        """Go on with what `save` wrote."""
        saved = torch.load(path, weights_only=True)
        future: Future = Future()
        future.set_result([_rollout(state) for state in saved["rollouts"]])
        self._begun = saved["number"], future


def _rollout(state: dict[str, Any]) -> Rollout:
    """The inverse of dataclasses.asdict."""
    answers = [[Completion(**answer) for answer in group] for group in state["completions"]]
    return Rollout(**{**state, "completions": answers, "scores": Scores(**state["scores"])})
