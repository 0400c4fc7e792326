"""Teachers: where the distributions come from that a student learns.

ModelTeacher(model)            # another model, or an earlier state of the student
AdapterOff()                   # the student itself without its adapter
TopKTeacher(ask)               # recorded top-k log-probs, or a server's
TextTeacher(model, tokenizer, student_tokenizer)     # a model with another tokenizer

Each sees the same packed batch as the student, but for TextTeacher, whose tokens are others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from posttrain.data.encode import Encoder
from posttrain.errors import ConfigError, DataError
from posttrain.packed.batch import PackedBatch, Segment, pack, upload
from posttrain.packed.divergence import States, Target, TopK, packed_states
from posttrain.packed.forward import check_context, packed_logps

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from posttrain.trainers.distill import Distillation, Example

TOP_COLUMNS = ("top_ids", "top_logps")
MOST_PROBABILITY = 1.01  # of recorded tokens together; servers round


class Student(Protocol):
    """The attributes of the trainer that teachers read."""

    model_wrapped: nn.Module
    accelerator: Accelerator
    args: TrainingArguments
    plan: Distillation

    def half_precision(self) -> AbstractContextManager[Any]:
        """Autocast as in training."""
        ...


class Teacher:
    """Answers a trainer's questions about the tokens of a micro-batch."""

    def check(self, model: nn.Module, plan: Distillation, longest: int) -> None:
        """Raise ConfigError where this teacher cannot teach this student; `longest` in tokens."""

    def ready(self, examples: list[Example]) -> list[Example]:
        """Add what is needed of the examples before they are cut into micro-batches."""
        return examples

    def target(self, student: Student, batch: PackedBatch, examples: Sequence[Example]) -> Target:
        """Return its side of the divergences at the batch's scored tokens."""
        raise NotImplementedError

    def logps(
        self,
        student: Student,
        batch: PackedBatch,
        examples: Sequence[Example],
        target: Target | None,
    ) -> Tensor:
        """(S,) log-probs of the scored tokens; `target` is what the method of that name gave."""
        raise NotImplementedError


class ModelTeacher(Teacher):
    """A causal LM with the student's tokenizer, loaded by load_for_inference."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()
        self._multipliers: dict[tuple, Callable] = {}  # of its head

    def check(self, model: nn.Module, plan: Distillation, longest: int) -> None:  # noqa: ARG002
        """Refuse sequences that are too long for the teacher."""
        check_context(self.model, longest, "Lower --max_length, or take another --teacher.")

    def target(self, student: Student, batch: PackedBatch, examples: Sequence[Example]) -> States:  # noqa: ARG002
        """Run the teacher, and keep its hidden states."""
        settings = {"temperature": student.plan.temperature, "multipliers": self._multipliers}
        with student.half_precision():
            return packed_states(self.model, batch, **settings)

    @torch.no_grad()
    def logps(
        self,
        student: Student,
        batch: PackedBatch,
        examples: Sequence[Example],  # noqa: ARG002
        target: States | None,
    ) -> Tensor:
        """Run the teacher, unless its states are known."""
        if target is not None:
            return target.logps(batch.targets)
        with student.half_precision():
            return packed_logps(self.model, batch, temperature=student.plan.temperature).logps


class AdapterOff(Teacher):
    """The student as it was before its adapter: self-distillation without a second model."""

    def check(self, model: nn.Module, plan: Distillation, longest: int) -> None:  # noqa: ARG002
        """Refuse a student without an adapter, and a loss that is 0 from the first step on."""
        if not hasattr(model, "disable_adapter"):
            raise ConfigError("--teacher adapter_off: expected --use_peft with it, found none.")
        if not plan.nll_weight:
            raise ConfigError(
                "--teacher adapter_off: a new adapter changes nothing, so teacher and student are "
                "the same and there is nothing to learn. Expected --nll_weight above 0, whose "
                "term the teacher then holds back, or another --teacher."
            )

    def target(self, student: Student, batch: PackedBatch, examples: Sequence[Example]) -> States:  # noqa: ARG002
        """Run the student with its adapter switched off."""
        model = student.model_wrapped
        with student.accelerator.unwrap_model(model).disable_adapter():
            return packed_states(model, batch, temperature=student.plan.temperature)


class TopKTeacher(Teacher):
    """The k most likely tokens at each place: in the data's columns `top_ids` and `top_logps`, or
    asked for.

    Both columns have a list for each trained token. ask: f(examples) -> the examples with them;
    None refuses examples without.
    """

    def __init__(self, ask: Callable[[list[Example]], list[Example]] | None = None) -> None:
        self.ask = ask

    def check(self, model: nn.Module, plan: Distillation, longest: int) -> None:  # noqa: ARG002
        """Refuse completions by the student where nobody can be asked about them."""
        if self.ask is None and plan.on_policy:
            raise ConfigError(
                "--teacher recorded: nobody can be asked about the student's own completions; "
                f"expected --lmbda 0, found {plan.on_policy:g}."
            )
        if plan.temperature != 1:
            raise ConfigError(
                "--temperature: log-probs of a server are at temperature 1, and its top tokens do "
                f"not say what they are at another; found {plan.temperature:g}."
            )

    def ready(self, examples: list[Example]) -> list[Example]:
        """Ask about the examples that nothing is known of."""
        if self.ask is None:
            return examples
        unknown = [example for example in examples if "top_ids" not in example]
        answers = iter(self.ask(unknown) if unknown else ())
        return [example if "top_ids" in example else next(answers) for example in examples]

    def target(self, student: Student, batch: PackedBatch, examples: Sequence[Example]) -> TopK:  # noqa: ARG002
        """Bring the tokens to the device, filled up to one width."""
        width = max((len(ids) for e in examples for ids in e.get("top_ids", ())), default=1)
        ids, logps = (
            [
                values + [fill] * (width - len(values))
                for example in examples
                for values in example.get(name, ())
            ]
            for name, fill in zip(TOP_COLUMNS, (0, -torch.inf), strict=True)
        )
        device, shape = batch.layout.device, (-1, width)
        flat_ids = [number for values in ids for number in values]
        flat_logps = [number for values in logps for number in values]
        return TopK(
            upload([flat_ids], dtype=torch.long, device=device)[0].view(shape),
            upload([flat_logps], dtype=torch.float32, device=device)[0].view(shape),
        )


class TextTeacher(Teacher):
    """A model with another tokenizer: it reads the student's text in tokens of its own.

    A span is the text between two neighbouring places where both have a boundary between tokens.
    The log-prob of a span is the sum of those of its tokens. The student's tokens of a span share
    the difference of the two log-probs evenly: their sum over a completion is that of the texts.
    For advantages alone, since the two vocabularies have no common distribution.

    The prompt is the student's, as text with its control tokens; a stop token of the student is
    compared with the teacher's end-of-sequence token.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.student_tokenizer = tokenizer, student_tokenizer
        self._encoder = Encoder(tokenizer)

    def check(self, model: nn.Module, plan: Distillation, longest: int) -> None:  # noqa: ARG002
        """Refuse a loss over the vocabulary."""
        if plan.divergence is not None:
            raise ConfigError(
                "--teacher: its tokenizer is not the student's, so that their distributions have "
                "no tokens in common. Take --method on_policy, which compares texts, --method sft, "
                "or a teacher with the student's tokenizer."
            )

    def ready(self, examples: list[Example]) -> list[Example]:
        """Add the teacher's tokens, and the spans."""
        return [self._read(example) for example in examples]

    def _read(self, example: Example) -> Example:
        if True not in example["trained"]:
            return example
        first = example["trained"].index(True)
        prompt, ids = example["input_ids"][:first], example["input_ids"][first:]
        if prompt[0] == self.student_tokenizer.bos_token_id:  # the teacher's own comes instead
            prompt = prompt[1:]
        stopped = example["finish_reason"] == "stop"
        written = ids[:-1] if stopped else ids
        decode = self.student_tokenizer.decode
        text = decode(written, skip_special_tokens=False)
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        theirs, ends = list(read["input_ids"]), [end for _, end in read["offset_mapping"]]
        spans = spans_of(token_ends(written, text, decode), ends)
        if stopped:
            spans.append(([len(written)], [len(theirs)]))
            theirs.append(self.tokenizer.eos_token_id)
        text = decode(prompt, skip_special_tokens=False)
        (prompt,) = self._encoder.prompts([text], add_bos=True)
        check_context(self.model, len(prompt) + len(theirs), "Lower --max_completion_length.")
        return {**example, "teacher_prompt": prompt, "teacher_ids": theirs, "spans": spans}

    @torch.no_grad()
    def logps(
        self,
        student: Student,
        batch: PackedBatch,  # noqa: ARG002
        examples: Sequence[Example],
        target: Target | None,  # noqa: ARG002
    ) -> Tensor:
        """(S,) the student's own log-probs plus each token's share of its span's difference."""
        segments = []
        for row, example in enumerate(examples):
            prompt, ids = example.get("teacher_prompt", [0]), example.get("teacher_ids", [])
            scored = [False] * len(prompt) + [True] * len(ids)
            segments.append(Segment([*prompt, *ids], scored=scored, row=row))
        theirs = pack(segments, num_rows=len(examples), device=student.args.device)
        with student.half_precision():
            scores = packed_logps(self.model, theirs, temperature=student.plan.temperature)
        rows = theirs.dense(scores.logps).tolist()
        found = []
        for row, example in zip(rows, examples, strict=True):
            own = example.get("policy_logps", [])
            for mine, other in example.get("spans", []):
                gap = sum(row[i] for i in other) - sum(own[i] for i in mine)
                found += [own[i] + gap / len(mine) for i in mine]
        return upload([found], dtype=torch.float32, device=student.args.device)[0]


Span = tuple[list[int], list[int]]  # tokens of the student, tokens of the teacher


def token_ends(ids: Sequence[int], text: str, decode: Callable[..., str]) -> list[int]:
    """Characters of `text` up to the end of each token; -1 within a character of several tokens."""
    ends = []
    for number in range(1, len(ids) + 1):
        part = decode(ids[:number], skip_special_tokens=False)
        ends.append(len(part) if text.startswith(part) else -1)
    if ends:
        ends[-1] = len(text)
    return ends


def spans_of(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> list[Span]:
    """Cut both sequences of tokens at the places where both have the end of a token.

    By hand: ends (2, 5, 6) and (1, 2, 6) have 2 and 6 in common, so the spans are tokens 0 and
    0-1, then 1-2 and 2.
    """
    common = {end for end in teacher_ends if end >= 0}.intersection(student_ends)
    spans: list[Span] = []
    mine, other = 0, 0
    for end in sorted(common):
        stops = [_last(ends, end) + 1 for ends in (student_ends, teacher_ends)]
        spans.append((list(range(mine, stops[0])), list(range(other, stops[1]))))
        mine, other = stops
    rest = (list(range(mine, len(student_ends))), list(range(other, len(teacher_ends))))
    if rest[0] or rest[1]:
        spans[-1:] = [_joined(spans[-1], rest)] if spans else [rest]
    return spans


def _last(ends: Sequence[int], end: int) -> int:
    return max(i for i, value in enumerate(ends) if value == end)


def _joined(one: Span, other: Span) -> Span:
    return one[0] + other[0], one[1] + other[1]


def check_recorded(rows: Sequence[Example], vocabulary: int, source: str) -> None:
    """Raise DataError for recorded rows of which a place, an id or a log-prob cannot be right.

    vocabulary: rows of the student's head. source: what the rows came from.
    """
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        missing = [n for n in ("input_ids", "trained", *TOP_COLUMNS) if row.get(n) is None]
        if missing:
            raise DataError(
                f"{where}: no '{missing[0]}'. A recorded row has input_ids, trained, and for each "
                "trained token a list of top_ids and one of top_logps, as a run with "
                "--teacher_url writes them."
            )
        problem = _problem(row, vocabulary)
        if problem:
            raise DataError(f"{where}: {problem}")


def _problem(row: Example, vocabulary: int) -> str:
    tokens, places = sum(row["trained"]), [len(row[name]) for name in TOP_COLUMNS]
    if len(row["trained"]) != len(row["input_ids"]) or places != [tokens, tokens]:
        return (
            f"expected a list of top_ids and one of top_logps for each of {tokens} trained "
            f"tokens, found {places[0]} and {places[1]}."
        )
    for ids, logps in zip(row["top_ids"], row["top_logps"], strict=True):
        if len(ids) != len(logps) or not ids:
            return f"expected as many top_logps as top_ids, found {len(logps)} and {len(ids)}."
        if not all(0 <= i < vocabulary for i in ids) or len(set(ids)) < len(ids):
            return f"expected different ids below {vocabulary}, the student's, found {ids}."
        total = sum(math.exp(x) for x in logps)
        if not total <= MOST_PROBABILITY:
            return f"expected log-probs of probabilities that add up to 1 at most, found {total:g}."
    return ""
