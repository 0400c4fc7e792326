"""The base of all trainers: micro-batches, global denominators, guards against NaN, metrics.

A trainer is a `transformers.Trainer` whose batch is a list of examples. Each step cuts it into
micro-batches of at most `max_tokens_per_microbatch` packed tokens (memory), while the loss is
normalised by a count over all ranks and accumulation steps (mathematics), so that cutting changes
nothing. A subclass defines an example's tokens, the items that the loss is a mean over, its sum.

    num_tokens(example), count_items(examples), microbatch_loss(model, examples)
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from posttrain.errors import ConfigError, DataError, NonFiniteLossError
from posttrain.packed.batch import split_by_tokens
from posttrain.packed.forward import (
    check_precision,
    check_vocabulary,
    is_finite,
    tokens_at_once,
)
from posttrain.packed.half import half_of
from posttrain.packed.prepare import prepare_once
from posttrain.run.engine import (
    SHARDED,
    assert_engine_in_place,
    assert_world_as_asked,
    from_all_ranks,
    making_no_folder,
    one_pass,
)
from posttrain.trainers.scaling import LossScaling

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase


class PackedTrainer(Trainer):
    """transformers.Trainer over packed micro-batches; see the module's docstring."""

    loss_is_scaled_for_ga = True  # the loss is a sum over a count of the whole optimizer batch

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        max_tokens_per_microbatch: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        prepare_once(model, half=args.bf16 or args.fp16)
        check_precision(model, args)
        check_vocabulary(model, tokenizer)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                "the model has no trainable parameter: expected at least one with requires_grad. "
                "Was it frozen, or was an adapter loaded for inference?"
            )
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False  # it hides NaN as loss 0, and syncs every micro-batch
        args.label_names = []
        # Rotary buffers are constants; broadcasting them would hang when ranks differ in forwards.
        args.ddp_broadcast_buffers = False
        args._n_gpu = min(args.n_gpu, 1)  # never nn.DataParallel: it cannot split a packed row
        with making_no_folder(args):
            super().__init__(
                model,
                args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                data_collator=list,
                callbacks=list(callbacks),
            )
        assert_world_as_asked(self.accelerator)
        self.remove_callback(PrinterCallback)
        if args.fp16:
            self.add_callback(LossScaling(self))
        limit = max_tokens_per_microbatch
        self.max_tokens_per_microbatch = limit or tokens_at_once(args.device)
        # Counted here, because ZeRO-3 leaves empty shells once training has begun.
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.metrics = Metrics()
        self.routers = getattr(model, "routers", None)  # of a mixture of experts
        self._window_loss: Tensor | None = None
        # DeepSpeed alone would divide by the number of accumulation steps once more.
        self._backward_options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self._tokens_since_log = 0
        self._last_log: float | None = None  # seconds; the clock starts with the first step
        # The signal that asked this rank to stop, that all ranks know of, that they stop by; or 0.
        self.stop_signal = self.agreed_signal = self.stopped_by = 0

    def num_tokens(self, example: dict) -> int:
        """Count the packed tokens of one example."""
        raise NotImplementedError

    def count_items(self, examples: Sequence[dict]) -> int:
        """Count the items (tokens, pairs, …) of these examples that the loss is a mean over."""
        raise NotImplementedError

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        """Sum the loss over the items of one packed micro-batch, and add to self.metrics."""
        raise NotImplementedError

    @property
    def steps_between_saves(self) -> int:
        """A checkpoint may be written after multiples of this number of steps."""
        return 1

    # The step.

    def _run_epoch(self, *arguments: object, **settings: object) -> None:
        """Take no step where all are taken: a run that was killed in its last save is resumed."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **settings)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        assert_engine_in_place(self.accelerator, self.model_wrapped)
        self._tokens_since_log, self._last_log, self.agreed_signal = 0, None, 0
        self.state.compute_steps(self.args, max_steps)  # else intervals are the checkpoint's
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Fetch the batches of one optimizer step, and count their items over all ranks."""
        self._last_log = self._last_log or time.perf_counter()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if batches and self.accelerator.gradient_state.end_of_dataloader:
            # accelerate fills the ranks' last batches up, and counts wrong once a run is resumed.
            size, rank = self.args.per_device_train_batch_size, self.args.process_index
            if real := len(self.train_dataset) % (size * self.args.world_size):
                batches[-1] = batches[-1][: max(0, real - rank * size)]
        # torch.full writes on the device; torch.tensor(…, device=…) would make the host wait.
        count = torch.full((), sum(map(self.count_items, batches)), device=device)
        if self.args.world_size > 1:
            dist.all_reduce(count)
        self._window_loss = torch.zeros((), device=device)
        return batches, count.clamp(min=1)

    def training_step(
        self, model: nn.Module, inputs: list[dict], num_items_in_batch: Tensor
    ) -> Tensor:
        """Forward and backward of one batch of examples, micro-batch by micro-batch."""
        model.train()
        parts = self._microbatches(inputs)
        total = torch.zeros((), device=self.args.device)
        # Engines average gradients over ranks. Undo it: the denominator is global already.
        scale = self.args.world_size / num_items_in_batch
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with one_pass(self.accelerator, model, last=last):
                loss = self._part_loss(model, part, inputs or [self.train_dataset[0]]) * scale
                total += loss.detach()
                self._window_loss += loss.detach()
                if last and self.accelerator.sync_gradients and self.is_deepspeed_enabled:
                    self._stop_if_not_finite()  # its backward also takes the optimizer step
                self.accelerator.backward(loss, **self._backward_options)
        self._tokens_since_log += sum(self.num_tokens(example) for example in inputs)
        return total

    def _microbatches(self, examples: Sequence[dict]) -> list[list[dict]]:
        """Cut a batch into micro-batches of at most max_tokens_per_microbatch packed tokens.

        DeepSpeed and FSDP communicate in every pass. Under them all ranks make the same number of
        micro-batches, and some may be empty.
        """
        sizes = [self.num_tokens(example) for example in examples]
        parts = split_by_tokens(sizes, self.max_tokens_per_microbatch)
        if self.args.world_size > 1 and self.accelerator.distributed_type in SHARDED:
            most = torch.full((), len(parts), device=self.args.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            most = int(most)
            parts = split_by_tokens(sizes, self.max_tokens_per_microbatch, min_parts=most)
        return [[examples[i] for i in part] for part in parts]

    def _part_loss(self, model: nn.Module, part: list[dict], examples: list[dict]) -> Tensor:
        if part and self.routers is not None:
            return self.routers.balanced(self, model, part)
        if part:
            return self.microbatch_loss(model, part)
        # Other ranks still have micro-batches: run a forward and backward with weight 0 so that
        # collectives match.
        metrics, self.metrics = self.metrics, Metrics()
        loss = self.microbatch_loss(model, examples[:1]) * 0
        self.metrics = metrics
        return loss

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float | None:
        """Return the gradient's norm, after checking it and the loss; the optimizer steps next."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.is_deepspeed_enabled:  # has checked the loss, and gives the norm as a number
            if norm is not None and not math.isfinite(norm):
                raise NonFiniteLossError(self._about_norm(norm))
        else:
            self._stop_if_not_finite(norm)
        return norm

    def _stop_if_not_finite(self, norm: Tensor | None = None) -> None:
        """Stop all ranks if any rank's loss or the gradient's norm is not finite.

        Clipping by a norm of NaN would make every weight NaN, under a finite loss. Both are read
        in one transfer, the only one of a step that makes the host wait for the device.
        """
        finite = torch.isfinite(self._window_loss)
        if norm is not None and not self.args.fp16:  # whose scaler skips steps by infinite norms
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2
            finite = torch.stack((finite, torch.isfinite(norm.to(finite.device))))
        bad, asked = (~finite).float().reshape(-1), self.stop_signal
        if self.args.world_size > 1:
            bad = torch.cat((bad, torch.full((1,), float(asked), device=bad.device)))
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)  # so that all ranks stop together
            *bad, asked = bad.tolist()
        else:
            bad = bad.tolist()
        self.agreed_signal = int(asked)
        bad_loss, *bad_norm = bad
        if bad_loss:
            raise NonFiniteLossError(
                f"the loss is not finite at step {self.state.global_step + 1} "
                f"({self._window_loss.item()} on rank {self.args.process_index}); "
                "stopped before the weights changed. Lower --learning_rate, or look for extreme "
                "rows in the data; the last checkpoint is untouched."
            )
        if any(bad_norm):
            raise NonFiniteLossError(self._about_norm(float(norm)))

    def _about_norm(self, norm: float) -> str:
        return (
            f"the gradient's norm is {norm} at step {self.state.global_step + 1}, with "
            "a finite loss; stopped. Lower --learning_rate, or look for extreme rows in the "
            "data; the last checkpoint is untouched."
        )

    def check_weights(self) -> None:
        """Raise NonFiniteLossError, on all ranks, unless every trained weight is finite."""
        bad = next((name for name, w in self._local_weights() if not is_finite(w)), "")
        if found := max(from_all_ranks(bad)):
            raise NonFiniteLossError(
                f"weights are not finite after step {self.state.global_step}, {found} first; they "
                "are not saved. Lower --learning_rate, or look for extreme rows in the data; the "
                "last checkpoint is untouched."
            )

    def _local_weights(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of each trained weight, with its name."""
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                part = getattr(weight, "ds_tensor", weight)  # ZeRO-3's shard
                yield name, part.to_local() if hasattr(part, "to_local") else part

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self.check_weights()
        super()._save_checkpoint(model, trial)

    def floating_point_ops(self, inputs: list[dict]) -> int:
        """Estimate 6 FLOPs per parameter and packed token: forward and backward, no attention."""
        tokens = sum(self.num_tokens(example) for example in inputs)
        return 6 * tokens * self._num_parameters

    # Logging and evaluation.

    def note(self, **per_item: Tensor) -> None:
        """Add tensors of one number per item to the metrics of these names, as means."""
        for name, values in per_item.items():
            self.metrics.add(name, values.sum(), len(values))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the reduced metrics and the speed to the Trainer's log line."""
        if "loss" in logs and self._last_log is not None:
            now = time.perf_counter()
            rate = self._tokens_since_log / (now - self._last_log)
            self._tokens_since_log, self._last_log = 0, now
            self.metrics.add("tokens_per_second", rate * self.args.world_size)
            logs = {**logs, **self.metrics.reduce()}
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,  # noqa: ARG002  (transformers' signature)
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute loss and metrics over the evaluation data, counting each example once.

        The model is used as it is, never prepared by accelerate for evaluation: that would make a
        later `train()` run without DDP.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None or len(dataset) == 0:
            raise DataError("evaluate: expected an evaluation set, found none.")
        training = self.metrics
        self.metrics = Metrics()
        # Until training begins the model is bare: no engine has placed it, or computes in bf16.
        is_bare = self.model_wrapped is self.model
        if is_bare and not self.is_in_train:
            self.model.to(self.args.device)
        with self.half_precision(enabled=is_bare):
            self._evaluate_into_metrics(dataset)
        results = {f"{metric_key_prefix}_{k}": v for k, v in self.metrics.reduce().items()}
        self.metrics = training
        self.log(results)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, results
        )
        return results

    def half_precision(self, *, enabled: bool = True) -> torch.autocast:
        """Return the autocast of training, for a model that accelerate did not prepare."""
        half = half_of(self.args)
        return torch.autocast(self.args.device.type, half, enabled=enabled and half is not None)

    @torch.no_grad()
    def _evaluate_into_metrics(self, dataset: Dataset) -> None:
        model = self.model_wrapped
        model.eval()
        for rows in self._eval_batches(len(dataset)):
            examples = [dataset[i] for i in rows]
            # Ranks without rows take part in the collectives of the forward, at weight 0.
            for part in self._microbatches(examples):
                loss = self._part_loss(model, part, examples or [dataset[0]])
                if part:
                    self.metrics.add("loss", loss, self.count_items(part))

    def _eval_batches(self, num_rows: int) -> Iterator[range]:
        """Yield this rank's rows, batch by batch; as many batches on every rank, some empty."""
        rank, world = self.args.process_index, self.args.world_size
        size = self.args.per_device_eval_batch_size
        for index in range(math.ceil(num_rows / (world * size))):
            start = min((index * world + rank) * size, num_rows)
            yield range(start, min(start + size, num_rows))


def refuse_empty(dataset: Dataset | None, what: str) -> None:
    """Raise DataError unless there is at least one `what` (document, pair, …) to train on."""
    if dataset is None or len(dataset) == 0:
        raise DataError(f"expected at least one {what} to train on, found none.")


class Metrics:
    """Weighted means that cost no host synchronisation until they are read."""

    def __init__(self) -> None:
        self._totals: dict[str, list[Tensor]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Add a sum over `count` items to the mean called `name`."""
        total, count = (torch.as_tensor(x).detach() for x in (total, count))
        if name in self._totals:
            self._totals[name][0] = self._totals[name][0] + total
            self._totals[name][1] = self._totals[name][1] + count
        else:
            self._totals[name] = [total, count]

    def add_all(self, values: Tensor, **named: Tensor) -> None:
        """Add, for each name, a tensor's masked mean: `values` is the mask."""
        for name, tensor in named.items():
            self.add(name, (tensor.detach() * values).sum(), values.sum())

    def reduce(self) -> dict[str, float]:
        """Means over all ranks since the last call. A collective: every rank must call it."""
        mine = {name: (t.item(), c.item()) for name, (t, c) in self._totals.items()}
        self._totals = {}
        # Objects, not a tensor: ranks need not have met the same metrics.
        everyone = from_all_ranks(mine)
        names = sorted({name for totals in everyone for name in totals})
        means = {}
        for name in names:
            pairs = [totals[name] for totals in everyone if name in totals]
            count = sum(count for _, count in pairs)
            means[name] = sum(total for total, _ in pairs) / count if count else float("nan")
        return means
