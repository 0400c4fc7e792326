"""Samples of the first held-out rows at each evaluation, for a run's report.

    SFTTrainer(…, callbacks=[HeldOutSamples(eval_documents, tokenizer, "runs/sft")])

Of a document or a pair: the model's own greedy completion of its prompt. Of a pair also chosen and
rejected, each with its log-ratio: how much likelier it is than under the model that training began
with, in nats. A few rows, so that it takes no time to speak of. Left out: models that an engine has
divided over ranks, and rows with images.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.data.encode import all_ends, num_ids
from posttrain.packed.batch import pack_pairs
from posttrain.packed.forward import packed_logps
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.record import EVALUATED_SAMPLES, token_logps
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.run.engine import asked_world
from posttrain.run.folder import append_log

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 128  # of a completion
WHOLE = ("none", "DDP")  # engines under which a rank has the whole model
SIDES = ("chosen", "rejected")


class HeldOutSamples(TrainerCallback):
    """Appends what a model makes of the first held-out rows to samples.jsonl in `run_folder`.

    rows: documents or pairs, as posttrain.data.load_documents or load_pairs makes them.
    """

    def __init__(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, run_folder: str | Path
    ) -> None:
        few = rows.select(range(min(EVALUATED_SAMPLES, len(rows))))
        self.rows = [row for row in few if not row.get("images") and prompt_of(row)]
        self.tokenizer, self.path = tokenizer, Path(run_folder) / "samples.jsonl"
        self.before: list[list[float]] = []  # sums of chosen and rejected before the first step

    def on_evaluate(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        model: nn.Module,
        **_: object,
    ) -> None:
        """Generate, score and write."""
        if not state.is_world_process_zero or asked_world(os.environ).engine not in WHOLE:
            return
        pairs = self._pairs(model, state.global_step)
        for place, own in enumerate(self._completions(model)):
            self._write(state.global_step, self.rows[place], own, "held out")
            for completion, side, log_ratio in pairs[place] if pairs else ():
                self._write(state.global_step, self.rows[place], completion, side, log_ratio)

    def _completions(self, model: nn.Module) -> list[Completion]:
        if not self.rows:
            return []
        listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends, vocabulary = tuple(all_ends(self.tokenizer, listed)), num_ids(self.tokenizer)
        greedy = Sampling(MOST_TOKENS, ends, temperature=0.0, vocabulary=vocabulary)
        prompts = [prompt_of(row) for row in self.rows]
        return [one for (one,) in HFGenerator(model).generate(prompts, greedy)]

    def _pairs(
        self, model: nn.Module, step: int
    ) -> list[list[tuple[Completion, str, float | None]]]:
        """For each pair both completions, scored, each with its side and its log-ratio."""
        if not self.rows or "chosen_ids" not in self.rows[0]:
            return []
        batch = pack_pairs(self.rows, device=next(model.parameters()).device)
        with torch.no_grad():
            logps = batch.dense(packed_logps(model, batch).logps)  # (2B, T)
        sums, ends = logps.sum(1).view(-1, 2).tolist(), all_ends(self.tokenizer, None)
        if step == 0:
            self.before = sums
        found: list[list[tuple[Completion, str, float | None]]] = []
        for place, row in enumerate(self.rows):
            found.append([])
            for side, name in enumerate(SIDES):
                ids = list(row[f"{name}_ids"])
                each = logps[2 * place + side, : len(ids)].tolist()
                ended = "stop" if ids[-1] in ends else "length"
                ratio = sums[place][side] - self.before[place][side] if self.before else None
                found[-1].append((Completion(ids, each, finish_reason=ended), name, ratio))
        return found

    def _write(
        self,
        step: int,
        row: Mapping[str, Any],
        completion: Completion,
        why: str,
        log_ratio: float | None = None,
    ) -> None:
        record = {
            "step": step,
            "prompt": self.tokenizer.decode(prompt_of(row)),
            "completion": self.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            "reward": None,
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "token_logps": token_logps(completion, self.tokenizer),
            "chosen": why,
        }
        if log_ratio is not None:
            record["log_ratio"] = round(log_ratio, 4)
        append_log(self.path, record)


def prompt_of(row: Mapping[str, Any]) -> list[int]:
    """Return the ids of a pair's prompt, or those of a document before its first trained token."""
    if "prompt_ids" in row:
        return list(row["prompt_ids"])
    return list(row["input_ids"][: row["trained"].index(True)])
