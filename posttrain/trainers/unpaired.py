"""Preference optimisation on single completions, each marked good or bad: KTO, BCO, APO-zero.

    trainer = UnpairedTrainer(model, args, completions=rows, tokenizer=tokenizer, loss=kto_loss)

A loss is a function of each completion's log-probs by policy and reference, and, if it names it, of
one number without gradient that the whole optimizer batch shares, on all ranks. With
h = log pi(y|x) - log pi_ref(y|x):

    reference_point   max(0, mean of h(x, y') over the batch's prompts x)         KTO section 4.1
    reward_shift      mean of beta h over the completions of all earlier steps    BCO section 4

y' is the completion of another prompt, chosen once for each row of the data, so that its reference
log-probs are data like all others, and neither shuffling nor cutting a batch changes a row's y'.
KTO needs a pass without gradient over the batch's (x, y') before it can train on any of its (x, y).
"""

from __future__ import annotations

import inspect
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from posttrain.data.encode import longest_sequence
from posttrain.errors import DataError
from posttrain.losses.pointwise import kto_reference_point
from posttrain.packed.batch import upload
from posttrain.packed.forward import check_context, packed_logps
from posttrain.run.folder import write_whole
from posttrain.run.options import is_main_process
from posttrain.trainers.base import refuse_empty
from posttrain.trainers.preference import (
    ReferencedRows,
    ReferencedTrainer,
    id_columns,
    inputs_of,
)
from posttrain.trainers.siblings import SiblingTrainer, pack_siblings, siblings

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt_ids", "completion_ids", "label")
# The arguments that a loss may name: (B,) log-probs in nats, (B,) marks, and the shared numbers.
LOSS_INPUTS = ("logps", "ref_logps", "desirable", "reference_point", "reward_shift")
SHIFT_FILE = "reward_shift.json"
ADVISED = (1.0, 1.5)  # of weight times number, good to bad: KTO (2402.01306) section 4.2


class UnpairedTrainer(SiblingTrainer, ReferencedTrainer):
    """Trains on `prompt_ids`, `completion_ids` and `label` (posttrain.data.load_unpaired).

    Args:
        loss: f(logps, ref_logps, desirable, …) -> (B,), one loss per completion, such as kto_loss
            with its hyper-parameters bound. It gets those of LOSS_INPUTS that its signature names.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        completions: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        loss: Callable[..., Tensor],
        eval_completions: Dataset | None = None,
        max_tokens_per_microbatch: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.loss_inputs = check_completions(completions, loss)
        self.needs_point = "reference_point" in self.loss_inputs
        self.needs_shift = "reward_shift" in self.loss_inputs
        rows = self._rows(completions)
        check_context(model, rows.longest, "Lower --max_length.")
        super().__init__(
            model,
            args,
            tokenizer=tokenizer,
            train_dataset=rows,
            eval_dataset=None if eval_completions is None else self._rows(eval_completions),
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            callbacks=callbacks,
        )
        self.loss = loss
        self.beta = inspect.signature(loss).parameters["beta"].default if self.needs_shift else 1.0
        self.shift = RunningMean(self.args.device)
        self._point: Tensor | None = None
        self._ratios: Tensor | None = None  # of the last micro-batch

    needs_reference = True

    def _rows(self, completions: Dataset) -> CompletionRows:
        return CompletionRows(completions, mismatched=self.needs_point)

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        """Sum the loss over the completions of one packed micro-batch."""
        inputs = self._inputs(model, examples)
        inputs |= {"reference_point": self._point, "reward_shift": self.shift.mean}
        self._ratios = inputs["logps"].detach() - inputs["ref_logps"]
        self._note(self._ratios, inputs)
        return self.loss(**{name: inputs[name] for name in self.loss_inputs}).sum()

    def _note(self, ratios: Tensor, inputs: dict[str, Any]) -> None:
        """Add the metrics of (B,) log-ratios; what is above the shared number counts as good."""
        good = inputs["desirable"]
        shared = self._point if self.needs_point else self.shift.mean / self.beta
        self.note(label_accuracy=((ratios > shared) == good).float())
        for name, which in (("desirable", good), ("undesirable", ~good)):
            found = {f"{name}_log_ratio": ratios, f"{name}_logps": inputs["logps"]}
            self.metrics.add_all(which.float(), **found)

    def _inputs(self, model: nn.Module, rows: Sequence[dict]) -> dict[str, Tensor]:
        """The (B,) arguments of a loss, from one forward."""
        flat = list(itertools.chain.from_iterable(siblings(rows)))
        columns = {
            "ref": [row["reference"][0] for row in flat],
            "label": [row.get("label", 0) for row in flat],
        }
        batch = pack_siblings(flat, device=self.args.device, row_columns=columns)
        return {
            "logps": batch.dense(packed_logps(model, batch).logps).sum(1),  # (B, T) -> (B,)
            "ref_logps": batch.row_column("ref"),
            "desirable": batch.row_column("label").bool(),
        }

    def _score(self, model: nn.Module, rows: Sequence[dict]) -> Tensor:
        """(B, C) summed log-probs of each row's completion and, where there is one, the other."""
        places = sorted(range(len(rows)), key=lambda i: rows[i]["prompt_ids"])  # neighbours share
        sorted_rows, columns = [rows[i] for i in places], id_columns(rows[0])[1:]
        batch = pack_siblings(sorted_rows, device=self.args.device, columns=columns)
        logps = batch.dense(packed_logps(model, batch).logps).sum(1).view(len(rows), -1)
        (order,) = upload([places], dtype=torch.long, device=self.args.device)
        return torch.empty_like(logps).index_copy_(0, order, logps)

    # What the whole optimizer batch shares.

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Fetch the batches of one optimizer step, and find what all their completions share."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.needs_shift:
            self.shift.settle()
        if self.needs_point:
            self._find_point(batches)
        return batches, count

    @torch.no_grad()
    def _find_point(self, batches: Iterable[Sequence[dict]]) -> None:
        """Estimate KTO's reference point from the mismatched completions of all ranks' batches."""
        model = self.model_wrapped
        model.eval()
        total = torch.zeros(2, device=self.args.device)
        for batch in batches:
            twins = [twin(row) for row in batch]
            spare = twins or [twin(self.train_dataset[0])]  # for the collectives of the others
            for part in self._microbatches(twins):
                inputs = self._inputs(model, part or spare[:1])
                ratios = inputs["logps"] - inputs["ref_logps"]
                if part:
                    total[0] += ratios.sum()
                    total[1] += len(part)
        if self.args.world_size > 1:
            dist.all_reduce(total)
        mean = total[:1] / total[1:].clamp(min=1)
        self._point = kto_reference_point(mean, torch.zeros_like(mean))
        self.note(kl=mean, reference_point=self._point[None])

    def _evaluate_into_metrics(self, dataset: Dataset | ReferencedRows) -> None:
        rows = dataset if isinstance(dataset, ReferencedRows) else self._rows(dataset)
        rows = self.with_reference(rows)
        if self.needs_point:
            self._find_point([rows[i] for i in batch] for batch in self._eval_batches(len(rows)))
        super()._evaluate_into_metrics(rows)

    def _part_loss(self, model: nn.Module, part: list[dict], examples: list[dict]) -> Tensor:
        loss = super()._part_loss(model, part, examples)
        if self.needs_shift and part and model.training:
            self.shift.add(self.beta * self._ratios)
        return loss

    # Checkpoints.

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        self.shift = RunningMean(self.args.device)
        if resume_from_checkpoint and self.needs_shift:
            self.shift.load(Path(resume_from_checkpoint) / SHIFT_FILE)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        if self.needs_shift:
            self.shift.settle()
            folder = Path(self._get_output_dir(trial=trial))
            self.shift.save(folder / f"checkpoint-{self.state.global_step}" / SHIFT_FILE)


class CompletionRows(ReferencedRows):
    """Labelled completions; with `mismatched` each has the `mismatched_ids` of another prompt's."""

    def __init__(self, rows: Dataset, *, mismatched: bool) -> None:
        super().__init__(rows)
        self.partners = partners(rows["prompt_ids"]) if mismatched else None
        self.longest = longest_sequence(rows, *COLUMNS[:2])
        if self.partners:
            prompts, completions = ([len(ids) for ids in rows[name]] for name in COLUMNS[:2])
            both = zip(prompts, self.partners, strict=True)
            self.longest = max(self.longest, *(n + completions[i] for n, i in both))

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Read rows together, each with its partner's completion."""
        rows = super().__getitems__(indices)
        if self.partners:
            others = self.rows.__getitems__([self.partners[index] for index in indices])
            for row, other in zip(rows, others, strict=True):
                row["mismatched_ids"] = other["completion_ids"]
        return rows


def partners(prompts: Iterable[Sequence[int]]) -> list[int]:
    """Choose for each row another row, with another prompt, whose completion it is paired with.

    A function of the prompts alone: these are shuffled, by a fixed seed, and each prompt's
    completions go to the prompt before. By hand: prompts a, b have the partners 1, 0. Raises
    DataError for fewer than two prompts.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(tuple(prompt), []).append(row)
    if len(rows_of) < 2:
        raise DataError(
            "completions: expected those of at least 2 prompts, found 1. KTO compares with the "
            "completions of other prompts; take --loss bco or apo_zero, or add prompts."
        )
    groups = list(rows_of.values())
    random.Random(0).shuffle(groups)
    order = [row for group in groups for row in group]
    found, end = [0] * len(order), 0
    for group in groups:
        end += len(group)
        others = len(order) - len(group)
        for place, row in enumerate(group):
            found[row] = order[(end + place % others) % len(order)]
    return found


def twin(row: dict) -> dict:
    """Return the row with its mismatched completion in place of its own."""
    other = {"completion_ids": row["mismatched_ids"], "reference": row["reference"][1:]}
    return {"prompt_ids": row["prompt_ids"], **other}


class RunningMean:
    """The mean of all numbers that all ranks have added, up to the last time they settled."""

    def __init__(self, device: torch.device) -> None:
        self.total, self.added = (torch.zeros(2, dtype=torch.float64, device=device) for _ in "ab")

    @property
    def mean(self) -> Tensor:
        """The mean; 0 of no numbers."""
        return (self.total[0] / self.total[1].clamp(min=1)).float()

    def add(self, values: Tensor) -> None:
        """Add numbers of this rank, which count once `settle` is called."""
        self.added[0] += values.sum()
        self.added[1] += len(values)

    def settle(self) -> None:
        """Take in what all ranks have added; a collective."""
        if dist.is_initialized():
            dist.all_reduce(self.added)
        self.total += self.added
        self.added.zero_()

    def save(self, path: Path) -> None:
        """Write sum and count, exactly."""
        if is_main_process():
            total, count = self.total.tolist()
            write_whole(path, json.dumps({"total": total, "count": count}))

    def load(self, path: Path) -> None:
        """Read what `save` wrote; raises DataError where it is not."""
        if not path.is_file():
            raise DataError(f"{path} is missing: a resumed BCO run needs its reward shift.")
        saved = json.loads(path.read_text(encoding="utf-8"))
        self.total = self.total.new_tensor([saved["total"], saved["count"]])


def check_completions(completions: Dataset, loss: Callable[..., Tensor]) -> list[str]:
    """Return the names of what the loss gets, if it can be trained on these completions.

    Raises DataError for columns or labels that are missing, or labels that are all alike,
    ConfigError for a loss that cannot be called. It needs no model.
    """
    refuse_empty(completions, "completion")
    missing = [column for column in COLUMNS if column not in completions.column_names]
    if missing:
        raise DataError(
            f"expected completions with the columns {', '.join(COLUMNS)} as load_unpaired makes "
            f"them; {', '.join(missing)} missing, found: {', '.join(completions.column_names)}."
        )
    labels = list(completions["label"])
    if None in labels:
        raise DataError(f"completion {labels.index(None)}: expected a label, true or false.")
    if not 0 < sum(labels) < len(labels):
        raise DataError(
            f"label: expected good and bad completions, found {sum(labels):,} good of "
            f"{len(labels):,}. A loss on single completions learns nothing but more or less of all "
            "of them; add the other kind, or train on good ones with recipes/sft.py."
        )
    return inputs_of(loss, LOSS_INPUTS, ("logps", "ref_logps", "desirable"))


def weights_advice(labels: Sequence[bool], weights: tuple[float, float]) -> str | None:
    """Say what weights KTO's authors advise, if weight times number of good completions to that of
    bad ones is not within ADVISED; None if it is. By hand: 1 good of 2 with equal weights has 1."""
    good, bad = sum(labels), len(labels) - sum(labels)
    ratio = weights[0] * good / (weights[1] * bad)
    low, high = ADVISED
    if low - 1e-9 <= ratio <= high + 1e-9:
        return None
    bounds = " to ".join(f"{bound * weights[1] * bad / good:.3g}" for bound in ADVISED)
    return (
        f"weights {good:,} good and {bad:,} bad completions, weighted {weights[0]:g} and "
        f"{weights[1]:g}: {ratio:.2f} to 1, where {low:g} to {high:g} is advised for KTO, as by "
        f"--desirable_weight {bounds}"
    )
