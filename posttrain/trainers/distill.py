"""Distillation: a student learns a teacher's distributions, on given texts or its own completions.

    plan = Distillation(divergence=partial(generalised_jsd_with_slope, beta=0.5))
    DistillTrainer(model, args, documents=documents, tokenizer=tokenizer,
                   teacher=ModelTeacher(teacher), plan=plan).train()

    L = (1/N) sum over trained tokens of  D(p_t, q_t) - A_t log q(y_t)

with p the teacher's distribution, q the student's, D a divergence over the vocabulary, A an
advantage made of log p(y) - log q(y), and N the trained tokens of the whole optimizer batch. Either
term may be left out. A share of the examples keeps only its prompt, which the student completes
anew in each step (on-policy); its tokens are the trained ones then. Which examples these are and
what is sampled depends on the seed, the step and the row alone, so that neither the cutting of
batches nor a resumed run changes it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError, DataError
from posttrain.packed.batch import PackedBatch, Segment, pack
from posttrain.packed.divergence import Divergence, packed_divergence
from posttrain.packed.forward import check_context, packed_logps
from posttrain.rollouts.policies import CurrentPolicy
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.run.engine import SHARDED
from posttrain.trainers.base import PackedTrainer, refuse_empty

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from posttrain.trainers.teachers import Teacher

Example = dict[str, Any]


@dataclass(frozen=True)
class Distillation:
    """The loss, and who writes the tokens that it is a mean over.

    Attributes:
        divergence: f(student's log-probs, *the teacher's rows) -> values and slopes, such as
            generalised_jsd_with_slope and top_k_kl_with_slope of posttrain.losses; None: no such
            term.
        advantage: f(student's, teacher's (B, T) log-probs of sampled tokens, mask) -> (B, T), such
            as reverse_kl_advantages; None: no such term.
        nll_weight: weight of the negative log-prob of given tokens, beside the divergence.
        on_policy: share of examples that the student completes itself, from 0 to 1.
        sampling: how it does; its temperature is also that of all distributions compared.

    Raises:
        ConfigError: Settings that have no loss, or do not go together.
    """

    divergence: Divergence | None = None
    advantage: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    nll_weight: float = 0.0
    on_policy: float = 0.0
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        if self.divergence is None and self.advantage is None:
            raise ConfigError("distillation: expected a divergence or an advantage, found neither.")
        if self.advantage is not None and self.on_policy < 1:
            raise ConfigError(
                "distillation: an advantage is of sampled tokens; expected on_policy 1 with it, "
                f"found {self.on_policy:g}."
            )
        if self.nll_weight and self.on_policy == 1:
            raise ConfigError(
                "distillation: nll_weight is of given tokens, and with on_policy 1 there are none."
            )
        if self.on_policy and (self.sampling is None or not self.sampling.temperature):
            raise ConfigError(
                "distillation: expected sampling with a temperature above 0 for on-policy "
                f"completions, found {self.sampling}."
            )
        if self.sampling and self.sampling.is_restricted:
            raise ConfigError(
                "distillation: expected sampling from the whole distribution, which the loss "
                "compares; found top_k, top_p or min_tokens."
            )

    @property
    def temperature(self) -> float:
        """The temperature of sampling and of all distributions that are compared."""
        return self.sampling.temperature if self.sampling else 1.0


class DistillTrainer(PackedTrainer):
    """Trains a student on a teacher's distributions; see the module.

    Args:
        documents: Rows of posttrain.data.load_documents; or with on_policy 1 also of load_prompts;
            or rows with the teacher's recorded top-k log-probs (posttrain.trainers.teachers).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        documents: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        teacher: Teacher,
        plan: Distillation,
        max_tokens_per_microbatch: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        refuse_empty(documents, "document")
        rows = _Rows(documents)
        longest = check_rows(rows, plan)
        check_context(model, longest, "Lower --max_length or --max_completion_length.")
        teacher.check(model, plan, longest)
        super().__init__(
            model,
            args,
            tokenizer=tokenizer,
            train_dataset=rows,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            callbacks=callbacks,
        )
        self.teacher, self.plan = teacher, plan
        self.current = CurrentPolicy(self, tokenizer)
        self.reference = None  # CurrentPolicy's view of a trainer

    # Examples.

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Fetch the batches of one optimizer step, with completions by the student as it is."""
        return super().get_batch_samples(map(self._ready, epoch_iterator), num_batches, device)

    def _ready(self, examples: list[Example]) -> list[Example]:
        """The examples with the student's completions, and with what the teacher needs of them."""
        if self.plan.on_policy:
            draws = [self._random(example, "share").random() for example in examples]
            chosen = [i for i, draw in enumerate(draws) if draw < self.plan.on_policy]
            self.metrics.add("on_policy", len(chosen), len(examples))
            # A rank without any completes one for nothing, where a divided model takes its first
            # forward on all ranks or on none: FSDP2 settles then when it lets go of parameters.
            idle = not chosen and self.accelerator.distributed_type in SHARDED
            sampled = self._completed([examples[i] for i in chosen] or examples[: int(idle)])
            found = dict(zip(chosen, sampled, strict=False))
            for example in found.values():
                self.metrics.add("mean_completion_tokens", len(example["policy_logps"]))
                self.metrics.add("truncated", example["finish_reason"] == "length")
            examples = [found.get(i, example) for i, example in enumerate(examples)]
        return self.teacher.ready(examples)

    def _random(self, example: Example, purpose: str) -> random.Random:
        """Random numbers of this row in this step."""
        return random.Random(
            f"{purpose} {self.args.seed} {self.state.global_step} {example['row']}"
        )

    def _completed(self, examples: list[Example]) -> list[Example]:
        """Complete the prompts of these examples; all ranks together, some of them with none."""
        prompts = [prompt_of(example) for example in examples]
        seeds = [self._random(example, "tokens").getrandbits(63) for example in examples]
        with self.current.generator() as generator:
            found = generator.generate(prompts, self.plan.sampling, 1, seeds=seeds)
        completions = [completion for (completion,) in found]
        return list(map(completed, examples, prompts, completions))

    def num_tokens(self, example: Example) -> int:
        """Count the tokens of one example."""
        return len(example["input_ids"])

    def count_items(self, examples: Sequence[Example]) -> int:
        """Count the trained tokens."""
        return sum(sum(example["trained"]) for example in examples)

    # The loss.

    def _part_loss(self, model: nn.Module, part: list[Example], examples: list[Example]) -> Tensor:
        if not part:  # other ranks still have micro-batches: tokens of which none is trained
            ids = examples[0]["input_ids"]
            examples = [{"row": 0, "input_ids": ids, "trained": [False] * len(ids)}]
        return super()._part_loss(model, part, examples)

    def microbatch_loss(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Sum the loss over the trained tokens of one packed micro-batch, in nats."""
        plan, batch = self.plan, self._pack(examples)
        target = None
        if plan.divergence is not None:
            target = self.teacher.target(self, batch, examples)
        coefficients = None
        if plan.advantage is not None:
            student, mask = batch.column("policy_logps"), batch.mask()
            teacher = batch.dense(self.teacher.logps(self, batch, examples, target))
            self.metrics.add_all(mask, kl=student - teacher)
            dense = plan.advantage(student, teacher, mask)
            coefficients = dense[batch.rows, batch.columns]
        elif plan.nll_weight:
            coefficients = plan.nll_weight * batch.column("given")[batch.rows, batch.columns]
        if target is None:
            scores = packed_logps(model, batch, temperature=plan.temperature)
            return -(coefficients * scores.logps).sum()
        found = packed_divergence(
            model,
            batch,
            target,
            divergence=plan.divergence,
            coefficients=coefficients,
            temperature=plan.temperature,
        )
        self.note(divergence=found.values, logps=found.logps)
        return found.losses.sum()

    def _pack(self, examples: Sequence[Example]) -> PackedBatch:
        """One segment for each example; whether its tokens were given, and the sampler's log-probs
        otherwise, as columns."""
        segments, columns = [], {"policy_logps": [], "given": []}
        for row, example in enumerate(examples):
            segments.append(Segment(example["input_ids"], scored=example["trained"], row=row))
            number, logps = sum(example["trained"]), example.get("policy_logps")
            columns["policy_logps"].append(logps if logps else [0.0] * number)
            columns["given"].append([float(logps is None)] * number)
        return pack(
            segments, num_rows=len(examples), device=self.args.device, token_columns=columns
        )


class _Rows(torch.utils.data.Dataset):
    """Documents or prompts as examples that know their row."""

    def __init__(self, documents: Dataset) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Example:
        row = self.documents[int(index)]
        if "input_ids" in row:
            return {**row, "row": int(index)}
        ids = row["prompt_ids"]
        return {"row": int(index), "input_ids": ids, "trained": [False] * len(ids)}


def prompt_of(example: Example) -> list[int]:
    """The tokens before the last run of trained ones, in a conversation the last answer."""
    trained = example["trained"]
    if not any(trained):
        return list(example["input_ids"])
    end = len(trained) - trained[::-1].index(True)
    while end and trained[end - 1]:
        end -= 1
    return list(example["input_ids"][:end])


def completed(example: Example, prompt: list[int], completion: Completion) -> Example:
    """Return the example with a sampled completion in place of its own."""
    ids = completion.token_ids
    return {
        "row": example["row"],
        "input_ids": prompt + ids,
        "trained": [False] * len(prompt) + [True] * len(ids),
        "policy_logps": completion.logps,
        "finish_reason": completion.finish_reason,
    }


def check_rows(rows: _Rows, plan: Distillation) -> int:
    """Return the tokens of the longest sequence that may occur.

    Raises:
        DataError: A row without a trained token where the data's own are trained, or without a
            prompt where the student completes it.
    """
    longest, room = 0, plan.sampling.max_tokens if plan.on_policy else 0
    for index in range(len(rows)):
        example = rows[index]
        if plan.on_policy < 1 and not any(example["trained"]):
            raise DataError(
                f"document {index}: expected at least one trained token, found none of "
                f"{len(example['trained'])}. Prompts alone need on-policy completions: --lmbda 1."
            )
        length = len(example["input_ids"]) if plan.on_policy < 1 else 0
        if plan.on_policy:
            prompt = len(prompt_of(example))
            if not prompt:
                raise DataError(f"document {index}: expected a prompt to complete, found none.")
            length = max(length, prompt + room)
        longest = max(longest, length)
    return longest
