"""The reference of a run that goes on: read back, and completed for the steps that are new.

A first start scores the rows that its steps see. Resumed for more steps, a run scores the others
with the model that it was given, before it takes the weights of its checkpoint: that model is the
reference still, which rows that are known already show.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from posttrain.errors import DataError
from posttrain.trainers.preference import (
    FILE_NAME,
    ReferencedRows,
    ReferencedTrainer,
    fingerprint,
    save_reference,
    sha256_of,
)

if TYPE_CHECKING:
    from datasets import Dataset

CHECKED = 8  # known rows that are scored again
# Relative and absolute (nats) difference that rows in other micro-batches may have.
EXACT, HALF = (1e-3, 1e-2), (2e-2, 0.5)


def complete_reference(trainer: ReferencedTrainer) -> None:
    """Score the training rows that the run is to see and that its first start did not.

    The trainer's model must be the one that the run was started with; DataError if it is not.
    """
    data, path = trainer.train_dataset, Path(trainer.args.output_dir, FILE_NAME)
    data.reference = load_reference(path, data)
    is_known = data.reference.isfinite().all(1)
    if is_known.all():
        return
    rows = None
    if trainer.args.max_steps > 0:
        rows = trainer.rows_seen(trainer.get_train_dataloader(), trainer.args.max_steps)
    missing = [row for row in (range(len(data)) if rows is None else rows) if not is_known[row]]
    if not missing:
        return
    known = is_known.nonzero().flatten()[:CHECKED].tolist()
    trainer.model.to(trainer.args.device)
    with trainer.half_precision():
        scored = trainer.score_rows(trainer.model, data, [*known, *missing])
    relative, absolute = HALF if trainer.args.bf16 or trainer.args.fp16 else EXACT
    before, now = data.reference[known], scored[known]
    if not torch.allclose(before, now, relative, absolute):
        raise DataError(
            f"{path}: expected the model that the run was started from, found another: row "
            f"{known[0]} had the log-probs {before[0].tolist()} and has {now[0].tolist()}. The "
            "rows of further steps need that model: give it, or keep to the first --max_steps."
        )
    data.reference[missing] = scored[missing]
    save_reference(path, data.reference, data)


def load_reference(path: Path, data: Dataset | ReferencedRows) -> Tensor:
    """Read (rows, C) log-probs, NaN if not scored; DataError if missing, damaged or of others."""
    try:
        with safe_open(path, framework="pt") as file:
            about, logps = file.metadata(), file.get_tensor("logps")
        found = "" if about.get("logps") in (None, sha256_of(logps)) else "its numbers are others"
    except (SafetensorError, FileNotFoundError) as error:
        found = str(error)
    if found:
        raise DataError(
            f"{path} is missing or damaged ({found}): a resumed run needs the reference log-probs "
            "of its first start. Start the run anew without --resume."
        )
    if about["pairs"] != fingerprint(data):
        raise DataError(
            f"{path} was made for other data than this run's {len(data)} rows. "
            "Resume with the data, template and lengths that the run was started with."
        )
    return logps


def refuse_unscored(path: Path, logps: Tensor, rows: Sequence[int] | None) -> None:
    """Raise DataError unless (rows, C) log-probs are known for `rows`, by default all."""
    if not logps[slice(None) if rows is None else rows].isfinite().all():
        raise DataError(
            f"{path} has the reference of the rows that the run was to see at its start, and the "
            "model is no longer that of others. Keep to that --max_steps, or start a new run."
        )
