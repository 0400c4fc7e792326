"""Samples of a few held-out rows at each evaluation, for a run's report.

    trainer.add_callback(HeldOutSamples(trainer, "runs/dpo"))    # of documents or pairs
    trainer.add_callback(HeldOutScores(trainer, "runs/reward"))  # of a reward model's pairs

Of a document or a pair: the model's own greedy completion of its prompt. Of a pair also chosen and
rejected, each with its log-ratio: how much likelier it is than under the model that training began
with, in nats. Of a reward model's pairs: those that it ranks most wrongly and best, and a few at
random, each completion with its score.

What held before the first step is kept in `held_out_before.json`, so that a resumed run compares
with it too. Where an engine divides the model over ranks, all of them take part in its forwards,
and its own completions are left out. Left out always: rows with images.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.data.encode import all_ends, num_ids
from posttrain.packed.batch import pack_pairs, split_by_tokens
from posttrain.packed.forward import packed_logps
from posttrain.packed.scalar import last_positions, packed_scalars
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.record import EVALUATED_SAMPLES, token_logps
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.run.engine import SHARDED, found_world
from posttrain.run.folder import append_log, write_whole
from posttrain.run.options import say

if TYPE_CHECKING:
    from torch import nn

    from posttrain.trainers.base import PackedTrainer

MOST_TOKENS = 128  # of a completion
DIVIDED = ("ZeRO-3", "FSDP")  # engines under which no rank has the whole model
SIDES = ("chosen", "rejected")
SCORED_PAIRS = 64  # held-out pairs among which a reward model's best and worst are looked for
WORST, BEST, RANDOM = 2, 1, 2  # of them are shown
BEFORE = "held_out_before.json"

Pair = list[list[float]]  # numbers of chosen, and of rejected


class HeldOutRows(TrainerCallback):
    """Appends what the model makes of some rows of the trainer's evaluation data to samples.jsonl.

    Subclasses say which rows, what is measured of a pair, and what is written.
    """

    def __init__(self, trainer: PackedTrainer, run_folder: str | Path) -> None:
        self.trainer, self.tokenizer = trainer, trainer.processing_class
        self.folder = Path(run_folder)
        self.engine = found_world(trainer.accelerator).engine
        # Their forwards communicate: every rank has to take part.
        self.together = trainer.accelerator.distributed_type in SHARDED
        self.rows = self.chosen_rows()
        self.before: list[Pair] | None = None

    def chosen_rows(self) -> list[dict[str, Any]]:
        """Choose the rows."""
        raise NotImplementedError

    def measured(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[Pair]:
        """Numbers of each pair's completions: of their tokens, or of the whole."""
        raise NotImplementedError

    def records(self, step: int, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        """Yield what is written; on the main process alone."""
        raise NotImplementedError

    def on_evaluate(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Measure, generate and write."""
        trainer, is_main = self.trainer, state.is_world_process_zero
        if not self.rows or not (is_main or self.together):
            return
        model = trainer.model_wrapped if self.together else trainer.model
        is_bare = trainer.model_wrapped is trainer.model
        with torch.no_grad(), trainer.half_precision(enabled=is_bare):
            pairs = self._pairs(model)
            if is_main:
                self._remember(state.global_step, pairs)
                for record in self.records(state.global_step, pairs):
                    append_log(self.folder / "samples.jsonl", record)

    def _pairs(self, model: nn.Module) -> list[Pair]:
        """Measure all pairs, as many at once as in training; none of documents."""
        if "chosen_ids" not in self.rows[0]:
            return []
        sizes = [self.trainer.num_tokens(row) for row in self.rows]
        found: dict[int, Pair] = {}
        for part in split_by_tokens(sizes, self.trainer.max_tokens_per_microbatch):
            pairs = self.measured(model, [self.rows[place] for place in part])
            found.update(zip(part, pairs, strict=True))
        return [found[place] for place in range(len(self.rows))]

    def _remember(self, step: int, pairs: Sequence[Pair]) -> None:
        """Keep the sums of before the first step; a resumed run reads them, if the rows are its."""
        path, rows = self.folder / BEFORE, zlib.crc32(repr(self.rows).encode())
        if step == 0:
            self.before = [[sum(side) for side in pair] for pair in pairs]
            write_whole(path, json.dumps({"rows": rows, "sums": self.before}))
        elif self.before is None and path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.before = kept["sums"] if kept["rows"] == rows else None

    def record(self, step: int, row: Mapping[str, Any], ids: list[int], why: str) -> dict[str, Any]:
        """Make what all records have; `why` is a side of the pair, or "held out"."""
        ended = ids and ids[-1] in all_ends(self.tokenizer, None)
        return {
            "step": step,
            "prompt": self.tokenizer.decode(prompt_of(row)),
            "completion": self.tokenizer.decode(ids, skip_special_tokens=True),
            "reward": None,
            "tokens": len(ids),
            "finish_reason": "stop" if ended else "length",
            "chosen": why,
        }


class HeldOutSamples(HeldOutRows):
    """Samples of the first held-out rows of SFT or DPO, with the log-ratios of pairs."""

    def chosen_rows(self) -> list[dict[str, Any]]:
        """Take the first rows that have a prompt and no images."""
        rows = self.trainer.eval_dataset
        few = [rows[place] for place in range(min(EVALUATED_SAMPLES, len(rows)))]
        return [row for row in few if not row.get("images") and prompt_of(row)]

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Say what is left out."""
        if self.engine in DIVIDED:
            say(
                f"samples the model's own completions of held-out rows are left out: {self.engine} "
                "divides it over the ranks"
            )

    def measured(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[Pair]:
        """Log-probs of the tokens of chosen and rejected, in nats."""
        batch = pack_pairs(rows, device=self.trainer.args.device)
        logps = batch.dense(packed_logps(model, batch).logps).tolist()  # (2B, T)
        return [
            [logps[2 * i + side][: len(row[f"{name}_ids"])] for side, name in enumerate(SIDES)]
            for i, row in enumerate(rows)
        ]

    def records(self, step: int, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        """Yield of each row the model's own completion, then chosen and rejected of a pair."""
        own = [None] * len(self.rows) if self.engine in DIVIDED else self._completions()
        for place, row in enumerate(self.rows):
            if completion := own[place]:
                record = self.record(step, row, list(completion.token_ids), "held out")
                record["finish_reason"] = completion.finish_reason
                yield record | {"token_logps": token_logps(completion, self.tokenizer)}
            for side, logps in enumerate(pairs[place] if pairs else ()):
                ids = list(row[f"{SIDES[side]}_ids"])
                scored = token_logps(Completion(ids, logps), self.tokenizer)
                record = self.record(step, row, ids, SIDES[side]) | {"token_logps": scored}
                if self.before is not None:
                    record["log_ratio"] = round(sum(logps) - self.before[place][side], 4)
                yield record

    def _completions(self) -> list[Completion]:
        model = self.trainer.model
        listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends, vocabulary = tuple(all_ends(self.tokenizer, listed)), num_ids(self.tokenizer)
        greedy = Sampling(MOST_TOKENS, ends, temperature=0.0, vocabulary=vocabulary)
        prompts = [prompt_of(row) for row in self.rows]
        return [one for (one,) in HFGenerator(model).generate(prompts, greedy)]


class HeldOutScores(HeldOutRows):
    """Held-out pairs as a reward model scores them: the worst, the best and a few at random.

    The worst is the pair with the lowest margin, score of chosen minus score of rejected: below 0
    it is ranked wrongly. They are looked for among SCORED_PAIRS pairs, the same at each evaluation.
    """

    def chosen_rows(self) -> list[dict[str, Any]]:
        """Choose pairs at random, the same in each process and run."""
        rows = self.trainer.eval_dataset
        places = random.Random(0).sample(range(len(rows)), min(SCORED_PAIRS, len(rows)))
        return [rows[place] for place in places]

    def measured(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[Pair]:
        """Scores of chosen and rejected."""
        batch = pack_pairs(rows, device=self.trainer.args.device)
        scores = packed_scalars(model, batch, last_positions(batch)).tolist()  # (2B,)
        return [
            [[chosen], [rejected]]
            for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)
        ]

    def records(self, step: int, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        """Yield both completions of the pairs that are shown, with score and margin."""
        scores = [[sum(side) for side in pair] for pair in pairs]
        margins = [chosen - rejected for chosen, rejected in scores]
        order = sorted(range(len(pairs)), key=margins.__getitem__)
        shown = dict.fromkeys(order[:WORST], "worst")
        for places, why in ((order[::-1][:BEST], "best"), (range(len(order))[:RANDOM], "random")):
            for place in places:
                shown.setdefault(place, why)
        for place, why in shown.items():
            for side, name in enumerate(SIDES):
                ids = list(self.rows[place][f"{name}_ids"])
                record = self.record(step, self.rows[place], ids, name) | {"pair": why}
                record |= {"reward": scores[place][side], "margin": margins[place]}
                if self.before is not None:
                    chosen, rejected = before = self.before[place]
                    record["before"] = {"reward": before[side], "margin": chosen - rejected}
                yield record


def prompt_of(row: Mapping[str, Any]) -> list[int]:
    """Return the ids of a pair's prompt, or those of a document before its first trained token."""
    if "prompt_ids" in row:
        return list(row["prompt_ids"])
    return list(row["input_ids"][: row["trained"].index(True)])
