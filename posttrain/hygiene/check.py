"""Whether a file can be trained on, and what is in it: one pass over its rows.

    report = check(RowStream(["my.jsonl"]), tokenizer=tokenizer)
    report.breaks        # sentences; empty when nothing would stop training

Without a tokenizer, templates and masks are not looked at.

Whether a template and its mask do on these rows what training needs: counts over all tokens.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.encode import Encoder
from posttrain.data.example import DroppedRow, Example
from posttrain.data.formats import DOCUMENTS, PAIRS, PROMPTS, STEPS, UNPAIRED, Format, parse_row
from posttrain.data.loading import (
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    MAX_EMPTY_SHARE,
    problem_of,
    quantiles,
)
from posttrain.data.read import Row
from posttrain.data.render import choose_template
from posttrain.errors import DataError
from posttrain.hygiene.duplicates import THRESHOLD, find_duplicates
from posttrain.hygiene.rows import Key, RowStream, format_of, key_of

LICENCE_COLUMNS = ("license", "licence", "source")
MAX_LICENCES = 20  # different values kept apart; more are no licences
LANGUAGE_SAMPLE = 1000  # rows
SAMPLE_CHARS = 2000  # of each of them: a language shows early
SEED = 20260101
NO_ROWS = (0, 0, 0)
NUM_ANSWERS = {DOCUMENTS: 1, PAIRS: 2, PROMPTS: 0, UNPAIRED: 1, STEPS: 1}  # as the loaders need


@dataclass
class Places:
    """How often something occurred, and where first."""

    count: int = 0
    first: str = ""

    def add(self, where: str) -> None:
        self.count += 1
        self.first = self.first or where


@dataclass
class CheckReport:
    """Counts over all rows. Lengths are (median, 95th percentile, longest), in characters.

    unreadable: rows that are errors; `first` is the whole message. dropped: reason -> rows that
    the loaders leave out. num_near: None when not looked for. languages: code -> share of a
    sample. licences: column -> value -> rows. tokens: None without a tokenizer.
    """

    source: str
    num_rows: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    unreadable: Places = field(default_factory=Places)
    dropped: dict[str, Places] = field(default_factory=dict)
    num_exact: int = 0
    num_near: int | None = None
    prompt_chars: tuple[int, int, int] = NO_ROWS
    answer_chars: tuple[int, int, int] = NO_ROWS
    languages: dict[str, float] = field(default_factory=dict)
    licences: dict[str, dict[str, int]] = field(default_factory=dict)
    tokens: TokenReport | None = None

    @property
    def breaks(self) -> list[str]:
        """What would stop training, or let it learn nothing; a sentence each."""
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


def check(
    stream: RowStream,
    *,
    tokenizer: Any = None,
    need: str | None = None,
    template: str = "auto",
    max_length: int = 2048,
    near: bool = True,
    threshold: float = THRESHOLD,
) -> CheckReport:
    """Read every row as training would, and count what is found.

    need: documents, pairs, …: what the rows are to be trained as; none: what their format gives
    first. near: look for near-duplicates too (a minute for half a million rows).
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
        self.formats, self.columns = Counter(), Counter()
        self.licences: dict[str, Counter] = {}
        self.prompt_chars, self.answer_chars = array("q"), array("q")
        self.sample: list[str] = []
        self.draw = random.Random(SEED)

    def __iter__(self) -> Iterator[Key]:
        for row in self.stream:
            self.report.num_rows += 1
            self._count_columns(row)
            try:
                entry = format_of(row)
                self.formats[entry.name] += 1
                self._check(row, entry)
                key = key_of(row)
            except DataError as error:
                self.report.unreadable.add(str(error))
                key = Key(str(row.values), "unreadable")
            yield key

    def finished(self) -> CheckReport:
        report = self.report
        report.formats, report.columns = dict(self.formats), dict(self.columns)
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
            if reason := problem_of(example, NUM_ANSWERS[need], need):
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
        place = self.draw.randrange(len(self.prompt_chars))
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


BLOCK_EXAMPLES = 1024  # tokenised in one call


@dataclass
class TokenReport:
    """lengths: (median, 95th percentile, longest) in tokens, before any limit.

    num_trained of num_tokens are targets; num_untrained documents have none within max_length, and
    num_unended none that is an end-of-sequence or end-of-turn token. refused: rows that the
    template cannot render, and the message of the first.
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
    lengths: tuple[int, int, int] = (0, 0, 0)
    breaks: list[str] = field(default_factory=list)


class TokenChecks:
    """Takes examples one by one; `finished` gives the report."""

    def __init__(self, tokenizer: Any, *, template: str, max_length: int) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.encoder = Encoder(tokenizer)
        self.report = TokenReport(max_length=max_length)
        self.lengths = array("q")
        self.renderers: dict[tuple[str, str], Any] = {}
        self.waiting: dict[tuple[str, str], list[Any]] = {}

    def add(self, example: Example, entry: Format, need: str) -> None:
        kind = (entry.name, need)
        if kind not in self.renderers:
            default = "r1_zero" if need == PROMPTS else "alpaca"
            self.renderers[kind] = choose_template(
                self.template, self.tokenizer, entry, default=default
            )
            self.report.template = self.renderers[kind].name
        try:
            rendered = _rendered(self.renderers[kind], example, need)
        except DataError as error:
            self.report.num_refused += 1
            self.report.refused = self.report.refused or str(error)
            return
        waiting = self.waiting.setdefault(kind, [])
        waiting += rendered
        if len(waiting) >= BLOCK_EXAMPLES:
            self._encode(kind)

    def finished(self) -> TokenReport:
        for kind in list(self.waiting):
            self._encode(kind)
        report = self.report
        if self.lengths:
            report.lengths = quantiles(self.lengths)
        report.breaks = self._breaks()
        return report

    def _encode(self, kind: tuple[str, str]) -> None:
        rendered, self.waiting[kind] = self.waiting[kind], []
        adds_bos = self.renderers[kind].adds_bos
        if not rendered:
            return
        if kind[1] == DOCUMENTS:
            for ids, trained in self.encoder.documents(rendered, add_bos=adds_bos):
                self._count_document(ids, trained)
            return
        prompts = self.encoder.prompts([prompt for prompt, _ in rendered], add_bos=adds_bos)
        answers = iter(self.encoder.answers([text for _, texts in rendered for text in texts]))
        for prompt, (_, texts) in zip(prompts, rendered, strict=True):
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
        documents = {DOCUMENTS} == {need for _, need in self.renderers}
        if whole and report.num_too_long == whole and not documents:
            found.append(f"Every example is longer than {report.max_length:,} tokens.")
        return found


def _rendered(renderer: Any, example: Example, need: str) -> list[Any]:
    if need == DOCUMENTS:
        return renderer.documents(example)
    answers = [] if need == PROMPTS else renderer.answers(example)
    return [(renderer.prompt(example), answers)]
