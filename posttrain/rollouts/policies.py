"""Provide the weights that generate rollouts: the current policy, or a frozen copy of it.

    policy = CurrentPolicy(trainer, tokenizer)
    with policy.generator() as generator: …

    frozen = FrozenPolicy(trainer, policy)
    prefetcher = RolloutPrefetcher(sample, freeze=frozen.freeze, num_rollouts=100)
    prefetcher(n)                     # rollout n, while rollout n + 1 is already being generated

With a prefetcher, rollout n is generated while the policy learns from rollout n - 1, by the weights
that it had before. So it is always stale by that one rollout, whichever of the two is faster. It
runs in a thread, not a process: the rewards, the data and a copy of the weights are in this process
already, and torch releases the interpreter lock while it computes.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from posttrain.errors import ConfigError, DataError
from posttrain.packed.half import half_of, hold_in_half
from posttrain.rewards.call import Scores
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.group import Rollout
from posttrain.rollouts.sampling import Completion, Generator
from posttrain.run.engine import SHARDED

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments

    from posttrain.rollouts.lookahead import Lookahead

MAX_STALENESS = 1  # rollouts that the policy may have learned from since a completion was sampled
PREFETCH_FILE = "rollout_ahead.pt"  # in checkpoints

Sample = Callable[[int], list[Rollout]]  # the number of a rollout -> its completions, scored


class MetricSink(Protocol):
    """Takes metrics as sums over a count."""

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Add a sum over `count` items to the mean called `name`."""
        ...


class TrainerView(Protocol):
    """The attributes of a trainer that rollouts, objectives and callbacks read."""

    model: nn.Module  # bare
    model_wrapped: nn.Module  # by DDP or DeepSpeed, once training has begun
    reference: nn.Module | None  # None without a reference, and with LoRA
    state: TrainerState
    args: TrainingArguments
    accelerator: Accelerator
    metrics: MetricSink

    def half_precision(self) -> AbstractContextManager[Any]:
        """Autocast as in training, for a model that accelerate did not prepare."""
        ...


class Engine(Generator, Protocol):
    """A generator with weights of its own, such as posttrain.rollouts.vllm."""

    version: int | None

    def sync(self, version: int) -> None:
        """Bring it the policy's weights, unless it has those of this optimizer step."""
        ...


StartEngine = Callable[[nn.Module, "Accelerator", "PreTrainedTokenizerBase"], Engine]


class CurrentPolicy:
    """The trainer's policy as it is at the moment.

    Args:
        start_engine: Makes what generates instead of the decode loop on the model itself.
        lookahead: Guesses tokens for the decode loop.
    """

    def __init__(
        self,
        trainer: TrainerView,
        tokenizer: PreTrainedTokenizerBase,
        start_engine: StartEngine | None = None,
        lookahead: Lookahead | None = None,
    ) -> None:
        self.trainer, self.tokenizer, self.lookahead = trainer, tokenizer, lookahead
        start = (trainer.model, trainer.accelerator, tokenizer)
        self.engine = start_engine(*start) if start_engine else None
        self.record_routing = False  # True: completions come with their experts

    @property
    def state(self) -> TrainerState:
        """The trainer's state that belongs to these weights."""
        return self.trainer.state

    def forget(self) -> None:
        """Make the engine fetch the weights anew, since a step number says nothing across runs."""
        if self.engine is not None:
            self.engine.version = None

    @contextmanager
    def generator(self) -> Iterator[Generator]:
        """Yield what generates by these weights; all ranks enter and leave together."""
        trainer = self.trainer
        if self.engine is not None:
            self.engine.sync(trainer.state.global_step)
            yield self.engine
            return
        with whole_model(trainer.accelerator, trainer.model_wrapped) as model:
            yield self.decoding(model)

    def decoding(self, model: nn.Module) -> HFGenerator:
        """Make the decode loop on a model, this one or its copy."""
        return HFGenerator(
            model,
            tokenizer=self.tokenizer,
            record_routing=self.record_routing,
            lookahead=self.lookahead,
        )


@contextmanager
def whole_model(accelerator: Accelerator, model: nn.Module) -> Iterator[nn.Module]:
    """Yield the bare model with every parameter in place, to generate with (under torch.no_grad).

    Ranks may run different numbers of forwards inside. Under ZeRO-3 and FSDP2 the parameters are
    gathered on every rank: the whole model must fit there. All ranks must enter and leave
    together. `model` is the wrapped model.
    """
    bare = accelerator.unwrap_model(model)
    offload = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
    if offload is not None:
        with _gathered_by_deepspeed(bare, offload):
            yield bare
    elif isinstance(model, FSDPModule):
        with _gathered_by_fsdp(model):
            yield bare
    else:
        yield bare


@contextmanager
def _gathered_by_deepspeed(bare: nn.Module, offload: Any) -> Iterator[None]:
    """Switch DeepSpeed's hooks off inside.

    Not only those that would fetch and release the parameters layer by layer: also the one that
    begins a forward, which compares the ranks' traces and would wait for a rank that runs fewer.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(bare.parameters())):
        for hook in offload.forward_hooks + offload.backward_hooks:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        begin = offload.module._forward_pre_hooks.pop(offload.fwd_pre_hook.id)
        try:
            yield
        finally:
            offload.fwd_pre_hook = offload.module.register_forward_pre_hook(begin)
            offload._register_deepspeed_module(offload.module)


@contextmanager
def _gathered_by_fsdp(model: FSDPModule) -> Iterator[None]:
    """Keep FSDP2's parameters gathered inside, also after a forward; its hooks then do nothing."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    frees = [
        any(group._reshard_after_forward for group in part._get_fsdp_state()._fsdp_param_groups)
        for part in parts
    ]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part, is_freed in zip(parts, frees, strict=True):
            part.set_reshard_after_forward(is_freed, recurse=False)
            part.reshard()


class Stopped(Exception):
    """Ends a rollout that nobody will read."""


class FrozenPolicy:
    """The policy as it was when `freeze` was called, for generating in a thread.

    Copies the weights that train (the others are shared), unless an engine has its own.
    """

    def __init__(self, trainer: TrainerView, current: CurrentPolicy) -> None:
        kind = trainer.accelerator.distributed_type
        if trainer.args.world_size > 1 or kind in SHARDED:
            raise ConfigError(
                f"--overlap_rollouts: expected one process without DeepSpeed or FSDP, found "
                f"{trainer.args.world_size} ({kind.value}). Ranks communicate while they generate, "
                "which two threads of each cannot do safely."
            )
        self.trainer, self.current, self.engine = trainer, current, current.engine
        self.state = copy.copy(trainer.state)
        self._stop = threading.Event()
        self.model = None if self.engine else self._copied(trainer.model)
        # On CUDA a stream of its own; otherwise its kernels would queue behind the trainer's.
        is_cuda = trainer.args.device.type == "cuda"
        self._stream = torch.cuda.Stream(trainer.args.device) if is_cuda else None

    def _copied(self, model: nn.Module) -> nn.Module:
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        copied = copy.deepcopy(model, frozen).eval()
        for parameter in copied.parameters():
            parameter.requires_grad_(False)
        if half := half_of(self.trainer.args):
            hold_in_half(copied, half)  # half the memory, and the same results under autocast
        copied.register_forward_pre_hook(self._stop_here)
        return copied

    def _stop_here(self, *_: object) -> None:
        if self._stop.is_set():
            raise Stopped

    @torch.no_grad()
    def freeze(self) -> None:
        """Take over the trainer's weights and state as they are now."""
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
    def generator(self) -> Iterator[Generator]:
        """Yield what generates by the frozen weights."""
        if self.engine is not None:
            yield self.engine
            return
        with torch.cuda.stream(self._stream), self.trainer.half_precision():
            yield self.current.decoding(self.model)

    def resume(self) -> None:
        """Allow generating again after `stop`."""
        self._stop.clear()

    def stop(self) -> None:
        """Interrupt the generation that is under way at its next forward pass."""
        self._stop.set()

    def staleness(self, rollout: Rollout, updates_per_rollout: int) -> float:
        """Number of rollouts that the policy has learned from since it sampled this one."""
        steps = self.trainer.state.global_step - rollout.policy_version
        stale = steps / updates_per_rollout
        if not 0 <= stale <= MAX_STALENESS:
            raise RuntimeError(
                f"a rollout by the policy of step {rollout.policy_version} arrived at step "
                f"{self.trainer.state.global_step}: {stale:g} rollouts later, where "
                f"{MAX_STALENESS} is allowed."
            )
        return stale


class RolloutPrefetcher:
    """A `Sample` that starts the next rollout before it is asked for.

    Args:
        sample: Runs in the thread, by weights that nobody else moves.
        freeze: Copies the current weights for it; called in the caller's thread, while nothing is
            being generated.
        num_rollouts: No rollout beyond these is started.
    """

    def __init__(self, sample: Sample, *, freeze: Callable[[], None], num_rollouts: int) -> None:
        self._sample, self._freeze, self._num_rollouts = sample, freeze, num_rollouts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._started: tuple[int, Future] | None = None

    def __call__(self, number: int) -> list[Rollout]:
        """Return rollout `number`, or raise what generating it raised, with its traceback."""
        if self._started is None:  # a run's first
            self._start(number)
        started, future = self._started
        if started != number:
            raise DataError(
                f"expected rollout {number} to have been generated ahead, found {started}. Resume "
                "from the checkpoint that it was saved with, with the same --updates_per_rollout."
            )
        begun = time.perf_counter()
        rollouts = future.result()
        rollouts[0].seconds["wait"] = time.perf_counter() - begun
        self._started = None
        if number + 1 < self._num_rollouts:
            self._start(number + 1)
        return rollouts

    def _start(self, number: int) -> None:
        self._freeze()
        self._started = number, self._thread.submit(self._sample, number)

    def wait(self) -> None:
        """Return when nothing is being generated; the result stays for the next call."""
        if self._started is not None:
            self._started[1].exception()

    def close(self) -> None:
        """End the thread, after the rollout that it is in the middle of."""
        self._thread.shutdown(cancel_futures=True)

    # Resuming: the rollout that was generated ahead belongs to weights that are gone by then.

    def save(self, folder: Path) -> None:
        """Write the rollout that was generated ahead, once it is done, if there is one."""
        if self._started is not None:
            number, future = self._started
            rollouts = [dataclasses.asdict(rollout) for rollout in future.result()]
            torch.save({"number": number, "rollouts": rollouts}, folder / PREFETCH_FILE)

    def load(self, folder: Path) -> None:
        """Continue with what `save` wrote, if it wrote a file."""
        path = folder / PREFETCH_FILE
        if path.is_file():
            saved = torch.load(path, weights_only=True)
            future: Future = Future()
            future.set_result([_rollout(state) for state in saved["rollouts"]])
            self._started = saved["number"], future


def _rollout(state: dict[str, Any]) -> Rollout:
    """The inverse of dataclasses.asdict."""
    completions = [[Completion(**fields) for fields in group] for group in state["completions"]]
    scores = Scores(**state["scores"])
    return Rollout(**{**state, "completions": completions, "scores": scores})
