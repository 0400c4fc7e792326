"""Check: can a file be trained on, and what is in it? One pass over its rows.

    report = check(RowStream(["my.jsonl"]), tokenizer=tokenizer)
    report.breaks        # sentences; empty when nothing would stop training

With a tokenizer, each row is also rendered and tokenised as training would, and the report says
whether the template refuses rows and whether the mask leaves something to learn.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from posttrain.data.encode import Encoder
from posttrain.data.example import DroppedRow, Example, Places, Segment
from posttrain.data.formats import DOCUMENTS, NEEDS, PROMPTS, Format, parse_row, unused_columns
from posttrain.data.loading import (
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    MAX_EMPTY_SHARE,
    quantiles,
    reason_to_drop,
)
from posttrain.data.read import Row
from posttrain.data.render import Renderer, choose_template, is_ready
from posttrain.errors import DataError
from posttrain.hygiene.duplicates import THRESHOLD, find_duplicates
from posttrain.hygiene.rows import Key, RowStream, format_of, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LICENCE_COLUMNS = ("license", "licence", "source")
MAX_LICENCES = 20  # different values kept apart; more are no licences
LANGUAGE_SAMPLE = 1000  # rows
SAMPLE_CHARS = 2000  # of each of them: a language shows early
SEED = 20260101
BLOCK_EXAMPLES = 1024  # tokenised in one call
NO_ROWS = (0, 0, 0)

Lengths = tuple[int, int, int]  # median, 95th percentile, longest
Exchange = tuple[str, list[str]]  # a prompt and its answers, as text


@dataclass
class CheckReport:
    """Counts over all rows; lengths are in characters.

    unused: columns that no loader reads; RL's rewards may. unreadable: rows that are errors;
    `first` is the whole message. dropped: reason -> rows that the loaders leave out. num_near: None
    when not looked for. languages: code -> share of a sample. licences: column -> value -> rows.
    tokens: None without a tokenizer.
    """

    source: str
    num_rows: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unreadable: Places = field(default_factory=Places)
    dropped: dict[str, Places] = field(default_factory=dict)
    num_exact: int = 0
    num_near: int | None = None
    prompt_chars: Lengths = NO_ROWS
    answer_chars: Lengths = NO_ROWS
    languages: dict[str, float] = field(default_factory=dict)
    licences: dict[str, dict[str, int]] = field(default_factory=dict)
    tokens: TokenReport | None = None

    @property
    def breaks(self) -> list[str]:
        """One sentence for each finding that would stop training, or let it learn nothing."""
        found = []
        if self.unreadable.count:
            found.append(f"{self.unreadable.count:,} rows cannot be read: {self.unreadable.first}")
        if len(self.formats) > 1:
            counts = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
            found.append(f"The rows have different formats: {counts}.")
        for reason in (EMPTY_ANSWER, EMPTY_PROMPT):
            places = self.dropped.get(reason, Places())
            if places.count > MAX_EMPTY_SHARE * self.num_rows:
                found.append(
                    f"{places.count:,} rows come {reason}, more than {MAX_EMPTY_SHARE:.0%} "
                    f"(first: {places.first})."
                )
        num_dropped = sum(places.count for places in self.dropped.values())
        if num_dropped + self.unreadable.count == self.num_rows:
            found.append("No row can be trained on.")
        return found + (self.tokens.breaks if self.tokens else [])


@dataclass
class TokenReport:
    """Counts over the tokens of all rows; `lengths` are in tokens, before any limit.

    num_trained of num_tokens are targets; num_untrained documents have none within max_length, and
    num_unended none that is an end-of-sequence or end-of-turn token. num_refused rows cannot be
    rendered by the template; `refused` is the message of the first. control: rows whose text
    spells out special tokens.
    """

    template: str = ""
    max_length: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    num_too_long: int = 0
    num_untrained: int = 0
    num_unended: int = 0
    num_refused: int = 0
    refused: str = ""
    control: Places = field(default_factory=Places)
    lengths: Lengths = NO_ROWS
    breaks: list[str] = field(default_factory=list)


def check(
    stream: RowStream,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    need: str | None = None,
    template: str = "auto",
    max_length: int = 2048,
    near: bool = True,
    threshold: float = THRESHOLD,
) -> CheckReport:
    """Read every row as training would, and count what is found.

    Args:
        need: a key of NEEDS, what the rows are to be trained as; None: what their format gives
            first.
        near: look for near-duplicates too (a minute for half a million rows).
        threshold: similarity of near-duplicates, as in find_duplicates.
    """
    checks = _Checks(stream, need)
    if tokenizer is not None:
        checks.tokens = TokenChecks(tokenizer, template=template, max_length=max_length)
    found = find_duplicates(checks, near=near, threshold=threshold)
    report = checks.finished()
    repeats = [place for place, kept in enumerate(found.kept.tolist()) if kept != place]
    report.num_exact = sum(bool(found.is_exact(place)) for place in repeats)
    report.num_near = len(repeats) - report.num_exact if near else None
    return report


class _Checks:
    """Iterated once: yields the key of each row, and counts everything else on the way."""

    def __init__(self, stream: RowStream, need: str | None) -> None:
        self.stream, self.need = stream, need
        self.report = CheckReport(stream.name)
        self.tokens: TokenChecks | None = None
        self.formats: Counter[str] = Counter()
        self.columns: Counter[str] = Counter()
        self.read: set[str] = set()  # columns that any row's format reads
        self.licences: dict[str, Counter[str]] = {}
        self.prompt_chars, self.answer_chars = array("q"), array("q")
        self.sample: list[str] = []
        self.random = random.Random(SEED)

    def __iter__(self) -> Iterator[Key]:
        for row in self.stream:
            self.report.num_rows += 1
            self._count_columns(row)
            try:
                entry = format_of(row)
                self.formats[entry.name] += 1
                self.read.update(set(row.values) - set(unused_columns(entry, row.values)))
                self._check(row, entry)
                key = key_of(row)
            except DataError as error:
                self.report.unreadable.add(str(error))
                key = Key(str(row.values), "unreadable")
            yield key

    def finished(self) -> CheckReport:
        """Complete the report with what can be said only after the last row."""
        report = self.report
        report.formats, report.columns = dict(self.formats), dict(self.columns)
        report.unused = [name for name in self.columns if name not in self.read]
        report.licences = {name: dict(values) for name, values in self.licences.items()}
        if self.prompt_chars:
            report.prompt_chars = quantiles(self.prompt_chars)
            report.answer_chars = quantiles(self.answer_chars)
        report.languages = languages_of(self.sample)
        report.tokens = self.tokens.finished() if self.tokens else None
        return report

    def _check(self, row: Row, entry: Format) -> None:
        need = self.need or entry.gives[0]
        if need not in entry.gives:
            raise DataError(
                f"{row.where}: the format '{entry.name}' gives {' or '.join(entry.gives)}, not "
                f"{need}."
            )
        try:
            examples = parse_row(entry, row)
        except DroppedRow as reason:
            self._drop(str(reason), row)
            return
        for example in examples:
            self._measure(example)
            if reason := reason_to_drop(example, need):
                self._drop(reason, row)
            elif self.tokens:
                self.tokens.add(example, entry, need)

    def _drop(self, reason: str, row: Row) -> None:
        self.report.dropped.setdefault(reason, Places()).add(row.where)

    def _measure(self, example: Example) -> None:
        prompt = example.input + "".join(turn["content"] for turn in example.turns)
        answer = "".join(turn["content"] for turn in example.answers)
        self.prompt_chars.append(len(prompt))
        self.answer_chars.append(len(answer))
        # Each example has the same chance to be in the sample (reservoir sampling).
        place = self.random.randrange(len(self.prompt_chars))
        text = f"{prompt}\n{answer}"[:SAMPLE_CHARS]
        if len(self.sample) < LANGUAGE_SAMPLE:
            self.sample.append(text)
        elif place < LANGUAGE_SAMPLE:
            self.sample[place] = text

    def _count_columns(self, row: Row) -> None:
        filled = [name for name, value in row.values.items() if value is not None]
        self.columns.update(filled)
        for name in filled:
            if name.lower() in LICENCE_COLUMNS:
                values = self.licences.setdefault(name, Counter())
                value = str(row.values[name])
                values[value if value in values or len(values) < MAX_LICENCES else "others"] += 1


def languages_of(texts: list[str]) -> dict[str, float]:
    """Language codes and their shares of the texts, the most frequent first."""
    from py3langid import classify

    counts = Counter(classify(text)[0] for text in texts if text.strip())
    total = sum(counts.values())
    return {language: count / total for language, count in counts.most_common()}


@dataclass
class _Batch:
    """Rendered examples of one format that wait to be tokenised together."""

    renderer: Renderer
    need: str
    documents: list[list[Segment]] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)

    def add(self, example: Example) -> None:
        """Render an example; DataError if the template cannot."""
        if self.need == DOCUMENTS:
            self.documents += self.renderer.documents(example)
            return
        answers = [] if self.need == PROMPTS else self.renderer.answers(example)
        self.exchanges.append((self.renderer.prompt(example), answers))


class TokenChecks:
    """Takes examples one by one; `finished` gives the report."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, template: str, max_length: int
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.encoder = Encoder(tokenizer)
        self.report = TokenReport(max_length=max_length)
        self.lengths = array("q")
        self.batches: dict[tuple[str, str], _Batch] = {}

    def add(self, example: Example, entry: Format, need: str) -> None:
        """Render and count an example of the format `entry`, to be trained as `need`."""
        kind = (entry.name, need)
        if kind not in self.batches:
            default = NEEDS[need].template
            renderer = choose_template(self.template, self.tokenizer, entry, default=default)
            self.batches[kind] = _Batch(renderer, need)
            self.report.template = renderer.name
        batch = self.batches[kind]
        literal = self.encoder.as_text(example)
        if literal is not example:
            self.report.control.add(example.where)
        try:
            batch.add(example if is_ready(batch.renderer, example) else literal)
        except DataError as error:
            self.report.num_refused += 1
            self.report.refused = self.report.refused or str(error)
            return
        if len(batch.documents) + len(batch.exchanges) >= BLOCK_EXAMPLES:
            self._encode(batch)

    def finished(self) -> TokenReport:
        """The report, after all examples were added."""
        for batch in self.batches.values():
            self._encode(batch)
        report = self.report
        if self.lengths:
            report.lengths = quantiles(self.lengths)
        report.breaks = self._breaks()
        return report

    def _encode(self, batch: _Batch) -> None:
        documents, batch.documents = batch.documents, []
        exchanges, batch.exchanges = batch.exchanges, []
        adds_bos = batch.renderer.adds_bos
        if documents:
            for ids, trained in self.encoder.documents(documents, add_bos=adds_bos):
                self._count_document(ids, trained)
        prompts = self.encoder.prompts([prompt for prompt, _ in exchanges], add_bos=adds_bos)
        answers = iter(self.encoder.answers([text for _, texts in exchanges for text in texts]))
        for prompt, (_, texts) in zip(prompts, exchanges, strict=True):
            lengths = [len(next(answers)) for _ in texts]
            self._count(len(prompt) + max(lengths, default=0), sum(lengths))

    def _count_document(self, ids: list[int], trained: list[bool]) -> None:
        self._count(len(ids), sum(trained))
        within = list(zip(ids, trained, strict=True))[: self.report.max_length]
        targets = {token for token, is_trained in within if is_trained}
        self.report.num_untrained += not targets
        self.report.num_unended += self.encoder.end_ids.isdisjoint(targets)

    def _count(self, length: int, num_trained: int) -> None:
        self.lengths.append(length)
        self.report.num_examples += 1
        self.report.num_tokens += length
        self.report.num_trained += num_trained
        self.report.num_too_long += length > self.report.max_length

    def _breaks(self) -> list[str]:
        report, found = self.report, []
        if report.num_refused:
            found.append(f"{report.num_refused:,} rows cannot be rendered: {report.refused}")
        whole = report.num_examples
        if whole and report.num_untrained == whole:
            found.append("The mask covers no token of any document within max_length.")
        elif whole and report.num_unended == whole:
            found.append(
                "No document has an end-of-sequence token among its targets within max_length: "
                "the model could not learn to stop."
            )
        documents = {DOCUMENTS} == {batch.need for batch in self.batches.values()}
        if whole and report.num_too_long == whole and not documents:
            found.append(f"Every example is longer than {report.max_length:,} tokens.")
        return found
