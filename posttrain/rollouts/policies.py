"""Drawing the next rollout in a thread, while the trainer learns from the last one.

    loader.draw = DrawAhead(loader.draw, freeze=copy_weights, num_rollouts=100)

`draw(n)` then gives rollout n and begins with n + 1, by the weights that `freeze` has just copied.
So which weights draw what does not depend on who is faster: rollout n is drawn by the policy that
learns from rollout n - 1 next, and is stale by that one rollout. A thread, not a process: the
rewards, the data and a copy of the weights are here already, and torch lets others run while it
computes.

Whose weights draw a trainer's answers: the policy's of now, or a copy from one rollout ago.

    with PolicyOfNow(trainer, engine=None).generator() as generator: …
    RLTrainer(…, overlap_rollouts=True)                                    # PolicyBefore

A policy here gives a generator and the trainer's state that goes with its weights.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.errors import ConfigError, DataError
from posttrain.rewards.call import Scores
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.group import Rollout
from posttrain.rollouts.sampling import Completion
from posttrain.rollouts.source import RolloutLoader
from posttrain.run.engine import SHARDED, whole_model

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


MAX_STALENESS = 1  # rollouts that the policy may have learnt from since an answer was drawn
AHEAD_FILE = "rollout_ahead.pt"  # in checkpoints


class PolicyOfNow:
    """The trainer's policy as it is.

    engine: f(model, accelerator, tokenizer) -> a generator with weights of its own and
    `sync(version)` (posttrain.rollouts.vllm); None: the decode loop on the model itself.
    """

    def __init__(self, trainer: Any, engine: Callable[..., Any] | None) -> None:
        self.trainer = trainer
        start = (trainer.model, trainer.accelerator, trainer.processing_class)
        self.engine = engine(*start) if engine else None

    @property
    def state(self) -> Any:
        return self.trainer.state

    def forget(self) -> None:
        """The weights of a step that the engine knows may be others by now: a new run begins."""
        if self.engine is not None:
            self.engine.version = None

    @contextmanager
    def generator(self) -> Iterator[Any]:
        """All ranks enter and leave together."""
        trainer = self.trainer
        if self.engine is not None:
            self.engine.sync(trainer.state.global_step)
            yield self.engine
            return
        with whole_model(trainer.accelerator, trainer.model_wrapped) as model:
            yield HFGenerator(model, tokenizer=trainer.processing_class)


class Stopped(Exception):
    """Ends a rollout that nobody will read."""


class PolicyBefore:
    """The policy as it was when `freeze` was called, drawing in a thread: see DrawAhead.

    Copies the weights that train (those that do not are shared), unless an engine has its own.
    """

    def __init__(self, trainer: Any, now: PolicyOfNow) -> None:
        if trainer.args.world_size > 1 or trainer.accelerator.distributed_type in SHARDED:
            raise ConfigError(
                f"--overlap_rollouts: expected one process without DeepSpeed or FSDP, found "
                f"{trainer.args.world_size} ({trainer.accelerator.distributed_type.value}). Ranks "
                "talk to each other while they draw, which two threads of each cannot do safely."
            )
        self.trainer, self.engine = trainer, now.engine
        self.ahead: DrawAhead | None = None
        self._stop = threading.Event()
        self.model = None if self.engine else self._copied(trainer.model)
        # On CUDA a stream of its own; else its kernels would queue behind the trainer's.
        is_cuda = trainer.args.device.type == "cuda"
        self._stream = torch.cuda.Stream(trainer.args.device) if is_cuda else None

    def _copied(self, model: nn.Module) -> nn.Module:
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        copied = copy.deepcopy(model, frozen).eval()
        for parameter in copied.parameters():
            parameter.requires_grad_(False)
        copied.register_forward_pre_hook(self._stop_here)
        return copied

    def _stop_here(self, *_: Any) -> None:
        if self._stop.is_set():
            raise Stopped

    @torch.no_grad()
    def freeze(self) -> None:
        """From here on, the generator's weights and the state are those of now."""
        self.state = copy.copy(self.trainer.state)
        self.state.log_history = list(self.state.log_history)
        if self.engine is not None:
            self.engine.sync(self.state.global_step)
            return
        pairs = zip(self.model.parameters(), self.trainer.model.parameters(), strict=True)
        for mine, weight in pairs:
            if weight.requires_grad:
                mine.copy_(weight)
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())

    @contextmanager
    def generator(self) -> Iterator[Any]:
        if self.engine is not None:
            yield self.engine
            return
        with torch.cuda.stream(self._stream), self.trainer.half_precision():
            yield HFGenerator(self.model, tokenizer=self.trainer.processing_class)

    # The thread, over one call of train().

    def start(self, loader: RolloutLoader, num_rollouts: int) -> None:
        """From here on `loader` draws ahead."""
        self._stop.clear()
        self.ahead = DrawAhead(loader.draw, freeze=self.freeze, num_rollouts=num_rollouts)
        loader.draw = self.ahead

    def wait(self) -> None:
        """Evaluation uses the engine, and the rewards, that the thread uses."""
        if self.ahead is not None:
            self.ahead.wait()

    def close(self) -> None:
        self._stop.set()
        if self.ahead is not None:
            self.ahead.close()
            self.ahead = None

    def save(self, folder: Path) -> None:
        self.ahead.save(folder / AHEAD_FILE)

    def load(self, folder: Path) -> None:
        if (folder / AHEAD_FILE).is_file():  # absent where nothing was drawn ahead
            self.ahead.load(folder / AHEAD_FILE)

    def staleness(self, rollout: Rollout) -> float:
        """Rollouts that the policy has learnt from since it drew this one."""
        steps = self.trainer.state.global_step - rollout.policy_version
        stale = steps / self.trainer.updates_per_rollout
        if not 0 <= stale <= MAX_STALENESS:
            raise RuntimeError(
                f"a rollout drawn by the policy of step {rollout.policy_version} came to step "
                f"{self.trainer.state.global_step}: {stale:g} rollouts later, where "
                f"{MAX_STALENESS} is allowed."
            )
        return stale
