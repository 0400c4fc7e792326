"""Preference optimisation on pairs: DPO and its family, each a function of a pair's log-probs.

    trainer = PreferenceTrainer(model, args, pairs=pairs, tokenizer=tokenizer, loss=dpo_loss)

The prompt of a pair is computed once for both completions. Reference log-probs are data: computed
once, before the first step, by the model that is about to train and through the same forward, if
the loss names them. A resumed run reads them back: its model is no longer the reference.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import itertools
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.data_loader import get_sampler
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from posttrain.data.encode import longest_sequence
from posttrain.errors import ConfigError, DataError
from posttrain.packed.batch import pack_pairs, upload
from posttrain.packed.forward import check_context, packed_logps
from posttrain.run.engine import rank_and_world
from posttrain.run.folder import whole_file
from posttrain.run.options import is_main_process, say
from posttrain.trainers.base import PackedTrainer, refuse_empty

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase

PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Of pairs, and of single completions with that of another prompt (posttrain.trainers.unpaired).
ID_COLUMNS = (*PAIR_COLUMNS, "completion_ids", "mismatched_ids")
SIDES = ("chosen", "rejected")
# The arguments that a preference loss may name. All are (B,), log-probs in nats and lengths in
# tokens, but for the mean length of all chosen completions of the optimizer batch: one number.
LOSS_INPUTS = (
    *(*SIDES, "ref_chosen", "ref_rejected"),
    *("chosen_lengths", "rejected_lengths", "mean_chosen_length"),
)
FILE_NAME = "reference.safetensors"
ROWS_AT_ONCE = 1000  # read from Arrow
PROGRESS_SECONDS = 30.0  # between two lines while the reference is scored


class ReferencedTrainer(PackedTrainer):
    """A trainer whose loss compares with the log-probs of the model that it starts from.

    Its data are ReferencedRows. A subclass says whether it `needs_reference`, and by `_score(model,
    rows)` gives the (B, C) summed log-probs of the C completions of each row.
    """

    needs_reference: bool
    _score: Callable[[nn.Module, Sequence[dict]], Tensor]

    def num_tokens(self, example: dict) -> int:
        """Count the packed tokens of a row: the prompt once, and its completions."""
        return row_tokens(example)

    def count_items(self, examples: Sequence[dict]) -> int:
        """Count the rows."""
        return len(examples)

    def with_reference(self, dataset: Dataset | ReferencedRows) -> ReferencedRows:
        """Return rows whose reference is known; DataError if the model is no longer it."""
        rows = dataset if isinstance(dataset, ReferencedRows) else ReferencedRows(dataset)
        if self.needs_reference and rows.reference is None:
            if self.state.global_step:
                raise DataError(
                    "evaluate: the reference of these rows is not known, and the model is no "
                    "longer the reference. Pass them for evaluation before training."
                )
            self._find_reference(rows, self.model_wrapped, resume=False)
        return rows

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        # Afterwards the model is wrapped for its engine, and has not taken a step.
        ready = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.needs_reference:
            seen = {self.train_dataset: self.rows_seen(train_dataloader, max_steps)}
            for data in filter(None, (self.train_dataset, self.eval_dataset)):
                resume = bool(resume_from_checkpoint)
                self._find_reference(data, ready[0], seen.get(data), resume=resume)
        return ready

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.needs_reference and model is None:  # its weights are still those of the start
            from posttrain.trainers.known_reference import complete_reference

            complete_reference(self)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def rows_seen(self, loader: DataLoader, max_steps: int) -> list[int] | None:
        """Return the rows that a run of so many steps sees; None: all.

        Engines that load weights late can score none for a run that goes on: half of all is all.
        """
        batches = max_steps * self.args.gradient_accumulation_steps * self.args.world_size
        num_rows = batches * self.args.train_batch_size
        sampler = copy.copy(get_sampler(loader))
        is_late = self.is_deepspeed_enabled or self.is_fsdp_enabled
        most = len(self.train_dataset) / (2 if is_late else 1)
        if num_rows >= most or not hasattr(sampler, "initial_seed"):
            return None
        sampler.generator = None  # it makes one of its seed; the loader's own is left alone
        return list(itertools.islice(sampler, num_rows))

    def _find_reference(
        self, data: ReferencedRows, model: nn.Module, seen: list[int] | None = None, *, resume: bool
    ) -> None:
        """Compute the log-probs of rows `seen`, or with `resume` read them; nothing if known."""
        path = Path(self.args.output_dir, "eval_" * (data is not self.train_dataset) + FILE_NAME)
        if resume or data.reference is not None:
            from posttrain.trainers.known_reference import load_reference, refuse_unscored

            if data.reference is None:
                data.reference = load_reference(path, data)
            return refuse_unscored(path, data.reference, seen)
        data.reference = self.score_rows(model, data, seen)
        return save_reference(path, data.reference, data)

    def score_rows(
        self, model: nn.Module, data: ReferencedRows, rows: Sequence[int] | None
    ) -> Tensor:
        """Return the (len(data), C) log-probs of `rows`, by default all, under `model`."""
        model.eval()
        settings = {"max_tokens": self.max_tokens_per_microbatch, "device": self.args.device}
        score = functools.partial(self._score, model)
        return compute_reference(score, data, rows, **settings).cpu()


class PreferenceTrainer(ReferencedTrainer):
    """Trains on pairs with `prompt_ids`, `chosen_ids`, `rejected_ids` (posttrain.data.load_pairs).

    Args:
        loss: f(chosen, rejected, …) -> (B,), one loss per pair, such as those of posttrain.losses
            with their hyper-parameters bound. It gets those of LOSS_INPUTS that its signature
            names. A loss that looks across pairs (aot_loss) sees one micro-batch at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        pairs: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        loss: Callable[..., Tensor],
        eval_pairs: Dataset | None = None,
        max_tokens_per_microbatch: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        refuse_empty(pairs, "pair")
        check_context(model, longest_sequence(pairs, *PAIR_COLUMNS), "Lower --max_length.")
        super().__init__(
            model,
            args,
            tokenizer=tokenizer,
            train_dataset=ReferencedRows(pairs),
            eval_dataset=None if eval_pairs is None else ReferencedRows(eval_pairs),
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            callbacks=callbacks,
        )
        self.loss = loss
        self.loss_inputs = inputs_of(loss, LOSS_INPUTS)
        self.needs_reference = "ref_chosen" in self.loss_inputs  # not of SimPO, CPO and ORPO
        self._mean_chosen_length: Tensor | float | None = None

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        """Sum the loss over the pairs of one packed micro-batch."""
        inputs = self._pair_inputs(model, examples, with_reference=self.needs_reference)
        chosen, rejected = inputs["chosen"].detach(), inputs["rejected"].detach()
        margin = chosen - rejected
        if self.needs_reference:
            margin = margin - (inputs["ref_chosen"] - inputs["ref_rejected"])
            self.note(
                chosen_log_ratio=chosen - inputs["ref_chosen"],
                rejected_log_ratio=rejected - inputs["ref_rejected"],
            )
        self.note(
            pair_accuracy=(margin.sign() + 1) / 2,  # a tie is half, as before the first step
            margin=margin,
            chosen_logps=chosen,
            rejected_logps=rejected,
            chosen_tokens=inputs["chosen_lengths"],
            rejected_tokens=inputs["rejected_lengths"],
        )
        inputs["mean_chosen_length"] = self._mean_chosen_length
        return self.loss(**{name: inputs[name] for name in self.loss_inputs}).sum()

    def _pair_inputs(
        self, model: nn.Module, examples: Sequence[dict], *, with_reference: bool
    ) -> dict[str, Tensor]:
        """The (B,) arguments of a loss, from one forward."""
        columns = {}
        if with_reference:  # goes to the device with the tokens, so that nothing waits for it
            columns["ref"] = [logp for pair in examples for logp in pair["reference"]]
        batch = pack_pairs(examples, device=self.args.device, row_columns=columns)
        logps = batch.dense(packed_logps(model, batch).logps).sum(1)  # (2B, T) -> (2B,)
        lengths = batch.mask().sum(1)
        inputs = {
            "chosen": logps[0::2],
            "rejected": logps[1::2],
            "chosen_lengths": lengths[0::2],
            "rejected_lengths": lengths[1::2],
        }
        if with_reference:
            reference = batch.row_column("ref")
            inputs |= {"ref_chosen": reference[0::2], "ref_rejected": reference[1::2]}
        return inputs

    def get_batch_samples(
        self, epoch_iterator: Iterator, batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Fetch the batches of one optimizer step, and count their pairs over all ranks.

        CPO and ORPO average over the tokens of all chosen completions of the optimizer batch.
        """
        batches, num_pairs = super().get_batch_samples(epoch_iterator, batches, device)
        if "mean_chosen_length" in self.loss_inputs:
            mine = sum(len(pair["chosen_ids"]) for batch in batches for pair in batch)
            num_tokens = torch.full((), mine, device=device)
            if self.args.world_size > 1:
                dist.all_reduce(num_tokens)
            self._mean_chosen_length = num_tokens / num_pairs
        return batches, num_pairs

    def _evaluate_into_metrics(self, dataset: Dataset | ReferencedRows) -> None:
        pairs = self.with_reference(dataset)
        if "mean_chosen_length" in self.loss_inputs:
            self._mean_chosen_length = sum(map(len, pairs.rows["chosen_ids"])) / len(pairs)
        super()._evaluate_into_metrics(pairs)

    def _score(self, model: nn.Module, pairs: Sequence[dict]) -> Tensor:
        """(B, 2) summed log-probs of chosen and rejected completions."""
        inputs = self._pair_inputs(model, pairs, with_reference=False)
        return torch.stack((inputs["chosen"], inputs["rejected"]), dim=1)


class ReferencedRows(torch.utils.data.Dataset):
    """Rows of a data set with their reference log-probs beside them, once these are known."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows
        self.reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Read rows together: Arrow takes a tenth of the time that it takes one by one."""
        rows = self.rows.__getitems__(list(indices))
        for row, index in zip(rows, indices, strict=True):
            if self.reference is not None:
                row["reference"] = self.reference[index].tolist()
        return rows


def inputs_of(
    loss: Callable[..., Tensor], available: Sequence[str], needed: Sequence[str] = SIDES
) -> list[str]:
    """List the tensors among `available` that a loss names and that are not bound yet.

    Raises ConfigError for a needed one that it does not take, or a required one that is not there.
    """
    parameters = inspect.signature(loss).parameters.values()
    bound = getattr(loss, "keywords", {})
    names = [p.name for p in parameters if p.name in available and p.name not in bound]
    missing = [
        p.name
        for p in parameters
        if p.name not in available and p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    if missing or not set(needed) <= set(names):
        raise ConfigError(
            f"loss {getattr(loss, '__name__', loss)}: expected arguments among "
            f"{', '.join(available)}, others bound with functools.partial; "
            f"found {', '.join(p.name for p in parameters)}."
        )
    return names


def id_columns(row: dict) -> list[str]:
    """List the columns of a row that hold its prompt and its completions, the prompt first."""
    return [column for column in ID_COLUMNS if column in row]


def row_tokens(row: dict) -> int:
    """Count the packed tokens of a row: the prompt once, and its completions."""
    return sum(len(row[column]) for column in id_columns(row))


def fingerprint(rows: Dataset | ReferencedRows) -> str:
    """Return a SHA-256 over ids and images of all rows, which names what log-probs belong to."""
    digest = hashlib.sha256()
    for row in _read_at_once(rows):
        for column in id_columns(row):
            digest.update(array("q", (len(row[column]), *row[column])).tobytes())
        for image in row.get("images") or ():
            digest.update(image["sha256"].encode())
    return digest.hexdigest()


def _read_at_once(data: Dataset | ReferencedRows) -> Iterator[dict]:
    """The rows in order, read some at a time."""
    for start in range(0, len(data), ROWS_AT_ONCE):
        yield from data.__getitems__(range(start, min(start + ROWS_AT_ONCE, len(data))))


def save_reference(path: Path, logps: Tensor, data: Dataset | ReferencedRows) -> None:
    """Write (rows, C) log-probs and the fingerprint of their data, whole or not at all."""
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"pairs": fingerprint(data), "logps": sha256_of(logps)}
        with whole_file(path) as partial:
            save_file({"logps": logps}, partial, metadata=about)


def sha256_of(values: Tensor) -> str:
    """Return the SHA-256 of a tensor's numbers."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def compute_reference(
    score: Callable[[Sequence[dict]], Tensor],
    data: Dataset | ReferencedRows,
    rows: Sequence[int] | None = None,
    *,
    max_tokens: int,
    device: torch.device,
) -> Tensor:
    """Compute the (rows, C) log-probs of `rows`, by default all; NaN elsewhere. Ranks share them.

    Micro-batches are filled with up to `max_tokens` packed tokens, longest rows first: rows of
    like length cost least padding in attention, and too little memory shows at once.

    Args:
        score: f(examples) -> (len(examples), C). Every rank calls it equally often (ZeRO-3, FSDP).
    """
    rows = range(len(data)) if rows is None else rows
    which = f"{len(rows):,} of " * (len(rows) < len(data)) + f"{len(data):,} rows"
    say(f"        reference log-probs of {which}, once, before the first step")
    rank, world = rank_and_world()
    sizes = list(map(row_tokens, _read_at_once(data)))
    parts = _fill({row: sizes[row] for row in sorted(rows)}, max_tokens)
    order, scored, said = [], [], time.monotonic()
    for start in range(0, len(parts), world):
        index = start + rank
        # A rank without a micro-batch of its own scores the first row again, for the collective.
        part = parts[index] if index < len(parts) else parts[0][:1]
        found = score(data.__getitems__(part))
        if index < len(parts):
            order += part
            scored.append(found)
        if time.monotonic() > said + PROGRESS_SECONDS:
            said = time.monotonic()
            say(f"        reference: {start + world:,} of {len(parts):,} batches, longest first")
    logps = torch.zeros(len(data), len(id_columns(data[0])) - 1, device=device)
    if scored:  # written at once: an upload of indices per micro-batch would wait for the device
        (places,) = upload([order], dtype=torch.long, device=device)
        logps[places] = torch.cat(scored).to(logps.dtype)
    if world > 1:
        dist.all_reduce(logps)  # each row is zero on every rank but one
    if others := sorted(set(range(len(data))).difference(rows)):
        logps[upload([others], dtype=torch.long, device=device)[0]] = torch.nan
    return logps


def _fill(sizes: Mapping[int, int], max_tokens: int) -> list[list[int]]:
    """Cut rows, largest first, into parts of at most max_tokens; one above it lies alone."""
    parts: list[list[int]] = []
    load = max_tokens
    for row in sorted(sizes, key=lambda row: -sizes[row]):
        if load + sizes[row] > max_tokens:
            parts.append([])
            load = 0
        parts[-1].append(row)
        load += sizes[row]
    return parts
