"""Rows that hold one completion each: those with the same prompt are packed behind it once.

parts = siblings(rows, most=max_tokens)              # rows with one prompt, brought together
batch = pack_siblings(itertools.chain(*parts), …)    # rows of the dense view in this order
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch

from posttrain.packed.batch import PackedBatch, pack_groups
from posttrain.trainers.base import PackedTrainer


class SiblingTrainer(PackedTrainer):
    """A trainer of rows with `prompt_ids` and `completion_ids`; siblings share a micro-batch."""

    def num_tokens(self, example: dict | list[dict]) -> int:
        """Count the packed tokens of a completion with its prompt, or of several with the same."""
        rows = example if isinstance(example, list) else [example]
        return len(rows[0]["prompt_ids"]) + sum(len(row["completion_ids"]) for row in rows)

    def _microbatches(self, examples: Sequence[dict]) -> list[list[dict]]:
        """Cut a batch into micro-batches; completions of one prompt stay together if they fit."""
        together = siblings(examples, most=self.max_tokens_per_microbatch)
        parts = super()._microbatches(together)
        return [list(itertools.chain.from_iterable(part)) for part in parts]


def siblings(rows: Iterable[dict], *, most: int | None = None) -> list[list[dict]]:
    """Bring rows with the same prompt together, in groups of at most `most` packed tokens."""
    groups: list[list[dict]] = []
    open_at: dict[tuple[int, ...], int] = {}
    loads: list[int] = []
    for row in rows:
        prompt, length = tuple(row["prompt_ids"]), len(row["completion_ids"])
        at = open_at.get(prompt)
        if at is None or (most is not None and loads[at] + length > most):
            at = open_at[prompt] = len(groups)
            groups.append([])
            loads.append(len(prompt))
        groups[at].append(row)
        loads[at] += length
    return groups


def pack_siblings(
    rows: Iterable[dict],
    *,
    device: torch.device,
    columns: Sequence[str] = ("completion_ids",),
    row_columns: Mapping[str, Sequence[float]] | None = None,
) -> PackedBatch:
    """Pack the completions in `columns` of each row; neighbours with the same prompt share it."""
    prompts, completions = [], []
    for prompt, same in itertools.groupby(rows, key=lambda row: row["prompt_ids"]):
        prompts.append(prompt)
        completions.append([row[column] for row in same for column in columns])
    return pack_groups(prompts, completions, device=device, row_columns=row_columns)
