"""What all loaders share: rows in, checked examples out, and the tally of both.

What a loader says: one line about the whole, then the first example, its targets marked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.encode import Document, Encoder, Truncation, cut
from posttrain.data.example import DroppedRow, Example
from posttrain.data.formats import DOCUMENTS, STEPS, detect_format, parse_row
from posttrain.data.read import Records, Row, Source, read_records
from posttrain.data.render import PromptTemplate, choose_template
from posttrain.errors import DataError

BLOCK_ROWS = 1024  # rows tokenised in one call: enough to keep the tokenizer's threads busy
MAX_EMPTY_SHARE = 0.01  # a few empty answers are noise in the data; more are a mistake
EMPTY_ANSWER, EMPTY_PROMPT = "with an empty answer", "with an empty prompt"
JOINED = (
    "whose prompt, tokenised together with its answer, would not end where the answer begins: "
    "tokenised apart"
)


class Loader:
    """One load: `blocks` gives examples, `keeps` and the checks count, `announce` says it all."""

    def __init__(self, source: Source | Records, tokenizer: Any, need: str, split: str | None):
        self.records = source if isinstance(source, Records) else read_records(source, split=split)
        self.need = need
        self.format = detect_format(self.records, need)
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)

    def choose(self, template: str | PromptTemplate, *, default: str) -> None:
        self.renderer = choose_template(template, self.tokenizer, self.format, default=default)
        self.tally = Tally(
            source=self.records.source,
            format=self.format.name,
            columns=list(self.format.columns),
            template=self.renderer.name,
            num_rows=len(self.records),
            rules=self.renderer.rules,
            noted=self.renderer.noted,
        )

    def blocks(self, *, num_answers: int) -> Iterator[list[tuple[Row, Example]]]:
        """Examples with at least `num_answers` answers, BLOCK_ROWS at a time."""
        block: list[tuple[Row, Example]] = []
        for row in self.records:
            block += [(row, example) for example in self._examples(row, num_answers)]
            if len(block) >= BLOCK_ROWS:
                yield block
                block = []
        if block:
            yield block
        self._refuse_many_empty()

    def _examples(self, row: Row, num_answers: int) -> list[Example]:
        try:
            examples = parse_row(self.format, row)
        except DroppedRow as reason:
            self.tally.drop(str(reason), row.where)
            return []
        problems = [problem_of(example, num_answers, self.need) for example in examples]
        for problem in filter(None, problems):
            self.tally.drop(problem, row.where)
        return [e for e, problem in zip(examples, problems, strict=True) if not problem]

    def _refuse_many_empty(self) -> None:
        for reason in (EMPTY_ANSWER, EMPTY_PROMPT):
            places = self.tally.dropped.get(reason, [])
            if len(places) > MAX_EMPTY_SHARE * len(self.records):
                raise DataError(
                    f"{self.records.source}: {len(places):,} of {len(self.records):,} rows come "
                    f"{reason} (first: {places[0]}). Up to {MAX_EMPTY_SHARE:.0%} are dropped; "
                    "more are taken for a mistake. Fill or remove them."
                )

    def note_joined(self, boundaries: Sequence[tuple[Example, str, str]]) -> None:
        """Count the examples of which a prompt would share a token with the answer after it."""
        joined = self.encoder.joins([(prompt, answer) for _, prompt, answer in boundaries])
        places = [e.where for (e, *_), joins in zip(boundaries, joined, strict=True) if joins]
        if places:
            self.tally.noted.setdefault(JOINED, []).extend(dict.fromkeys(places))

    def exchanges(self, examples: Sequence[Example]) -> list[tuple[list[int], list[list[int]]]]:
        """Prompt ids and the ids of each answer, tokenised apart."""
        prompts = [self.renderer.prompt(example) for example in examples]
        answers = [self.renderer.answers(example) for example in examples]
        each = zip(examples, prompts, answers, strict=True)
        self.note_joined([(e, prompt, text) for e, prompt, texts in each for text in texts])
        ids = iter(self.encoder.answers([text for texts in answers for text in texts]))
        return [
            (prompt, [next(ids) for _ in texts])
            for prompt, texts in zip(self.prompt_ids(prompts), answers, strict=True)
        ]

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        return self.encoder.prompts(texts, add_bos=self.renderer.adds_bos)

    def keeps(self, example: Example, prompt_ids: list[int], length: int, limit: int) -> bool:
        """Whether it fits; counted either way."""
        self.tally.lengths.append(length)
        if not prompt_ids:  # nothing could predict the answer's first token
            self.tally.drop(EMPTY_PROMPT, example.where)
        elif length > limit:
            self.tally.drop(f"longer than {limit:,} tokens", example.where)
        return bool(prompt_ids) and length <= limit

    def fit(
        self, example: Example, document: Document, max_length: int, truncation: Truncation
    ) -> Document | None:
        """The document within max_length; None where it is left out. Counted either way."""
        self.tally.lengths.append(len(document[0]))
        kept = cut(document, max_length, truncation, self.tokenizer.bos_token_id)
        if kept is None:
            self.tally.drop(f"longer than {max_length:,} tokens", example.where)
        elif not any(kept[1]):
            self.tally.drop("without a target within max_length", example.where)
            kept = None
        elif len(document[0]) > max_length:
            self.tally.num_truncated += 1
            self.tally.num_unended += kept[0][-1] not in self.encoder.end_ids
        return kept

    def count_gold(self, example: Example) -> None:
        if example.gold is not None:
            count = self.tally.golds.get(example.gold_rule, 0)
            self.tally.golds[example.gold_rule] = count + 1

    def check(self, num_kept: int, limit: str) -> None:
        if num_kept:
            return
        reasons = ", ".join(f"{len(p):,} {reason}" for reason, p in self.tally.dropped.items())
        lengths = ""
        if self.tally.lengths:
            middle, _, longest = quantiles(self.tally.lengths)
            lengths = f" Their lengths: median {middle:,}, longest {longest:,} tokens; {limit}."
        raise DataError(
            f"{self.records.source}: none of {self.tally.num_rows:,} rows can be used as "
            f"{self.need} ({reasons}).{lengths} Raise the limit or mend the rows."
        )

    def check_ends_are_trained(self, columns: dict[str, list], max_length: int) -> None:
        """Refuse documents that would never teach the model to stop."""
        for ids, trained in zip(*columns.values(), strict=True):
            if not self.encoder.end_ids.isdisjoint(ids[trained].tolist()):
                return
        raise DataError(
            f"{self.records.source}: no document keeps its end-of-sequence token within "
            f"max_length={max_length}, so the model could not learn to stop. Raise max_length, or "
            "cut the documents into shorter ones."
        )

    def announce(self, num_kept: int, first: list[Run], say: Say | None, detail: str = "") -> None:
        line = summary_line(self.tally, num_kept, self.need + detail)
        announce(line, "first example", first, say)


def problem_of(example: Example, num_answers: int, need: str) -> str:
    """Why the example is dropped; empty when it is fine."""
    contents = [a["content"].strip() or a.get("tool_calls", "") for a in example.answers]
    if len(contents) < num_answers:
        return "without an assistant turn"
    if example.gold == "":
        return EMPTY_ANSWER
    last = example.turns[-1] if example.turns else None
    if last and last["role"] in ("system", "user") and not last["content"].strip():
        return EMPTY_PROMPT
    if num_answers and not all(contents):
        return EMPTY_ANSWER
    if num_answers and need != STEPS and len(set(map(str, example.answers))) < len(contents):
        return "whose chosen equals rejected"
    if need == DOCUMENTS and False in example.labels:
        return "labelled as a bad answer"
    return ""


Say = Callable[[str], None]
Run = tuple[str, bool]  # decoded text, and whether the model is trained on it
MAX_RUN_CHARS, MAX_RUNS = 320, 8
MARKS = ("«", "»")


@dataclass
class Tally:
    """Counts over one load. `lengths`: tokens of each example before any limit."""

    source: str
    format: str
    columns: list[str]
    template: str
    num_rows: int
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> where
    lengths: list[int] = field(default_factory=list)
    num_truncated: int = 0
    num_unended: int = 0  # truncated documents that no longer close with an end token
    golds: dict[str, int] = field(default_factory=dict)  # rule -> examples
    rules: dict[str, int] = field(default_factory=dict)  # rule that found the targets -> turns
    noted: dict[str, list[str]] = field(default_factory=dict)  # reason -> where; these are kept

    def drop(self, reason: str, where: str) -> None:
        self.dropped.setdefault(reason, []).append(where)

    @property
    def num_dropped(self) -> int:
        return sum(map(len, self.dropped.values()))


def quantiles(lengths: Sequence[int]) -> tuple[int, int, int]:
    """Median, 95th percentile (nearest rank) and maximum."""
    ordered = sorted(lengths)
    rank = [-(-len(ordered) * percent // 100) - 1 for percent in (50, 95)]
    return ordered[rank[0]], ordered[rank[1]], ordered[-1]


def summary_line(tally: Tally, num_kept: int, kept: str) -> str:
    """Rows, format, columns, template, dropped rows and why, token lengths, truncated share."""
    parts = [
        f"{tally.source}: {tally.num_rows:,} rows of {tally.format} ({', '.join(tally.columns)}), "
        f"template {tally.template} -> {num_kept:,} {kept}"
    ]
    if tally.dropped:
        parts.append(f"dropped {tally.num_dropped:,}: {_reasons(tally, tally.dropped)}")
    if tally.rules:
        rules = [f"{count:,} by {rule}" for rule, count in tally.rules.items()]
        parts.append(f"assistant turns found: {', '.join(rules)}")
    if tally.noted:
        parts.append(f"kept, but note: {_reasons(tally, tally.noted)}")
    if tally.golds:
        rules = [f"{count:,} from {rule}" for rule, count in tally.golds.items()]
        parts.append(f"reference answers: {', '.join(rules)}")
    middle, high, longest = quantiles(tally.lengths)
    parts.append(f"tokens p50 {middle:,}, p95 {high:,}, max {longest:,}")
    if kept == "documents":
        parts.append(f"{100 * tally.num_truncated / num_kept:.1f}% truncated")
    if tally.num_unended:
        parts[-1] += f", {tally.num_unended:,} of them without an end token"
    return "; ".join(parts)


def _reasons(tally: Tally, places_of: dict[str, list[str]]) -> str:
    return ", ".join(
        f"{len(places):,} {reason} (first: {places[0].removeprefix(f'{tally.source}, ')})"
        for reason, places in places_of.items()
    )


def marked_example(runs: Sequence[Run], *, marks: tuple[str, str] = MARKS, escape=str) -> str:
    """The runs on one line, trained ones between the marks, long ones with their middle cut."""
    shown = []
    for text, trained in runs[:MAX_RUNS]:
        text = escape(_cut(text).replace("\n", "↵"))
        shown.append(f"{marks[0]}{text}{marks[1]}" if trained else text)
    if len(runs) > MAX_RUNS:
        shown.append(f" … and {len(runs) - MAX_RUNS} more pieces")
    return "".join(shown)


def announce(line: str, label: str, runs: Sequence[Run], say: Say | None) -> None:
    """Say the summary and the first example, on the main process only.

    say: called with each line; None prints, in colour on a terminal.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if say is None and sys.stdout.isatty():
        _print_in_colour(line, label, runs)
        return
    say = say or _print
    say(line)
    note = f" (trained between {MARKS[0]} {MARKS[1]})" if any(t for _, t in runs) else ""
    say(f"{label}{note}: {marked_example(runs)}")


def _print_in_colour(line: str, label: str, runs: Sequence[Run]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(escape(line))
    example = marked_example(runs, marks=("[bold green]", "[/]"), escape=escape)
    note = " (trained tokens in [bold green]green[/])" if any(t for _, t in runs) else ""
    console.print(f"{label}{note}: {example}")


def _print(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal without « must not end the run
    print(line.encode(encoding, "replace").decode(encoding), flush=True)


def _cut(text: str) -> str:
    half = MAX_RUN_CHARS // 2
    return text if len(text) <= MAX_RUN_CHARS else f"{text[:half]} … {text[-half:]}"
