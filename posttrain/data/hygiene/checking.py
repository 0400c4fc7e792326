"""Whether a file can be trained on, and what is in it: one pass over its rows.

    report = check(RowStream(["my.jsonl"]), tokenizer=tokenizer)
    report.breaks        # sentences; empty when nothing would stop training

Without a tokenizer, templates and masks are not looked at.
"""

import random
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.examples import DroppedRow, Example
from posttrain.data.formats import DOCUMENTS, PAIRS, PROMPTS, STEPS, UNPAIRED, Format, parse_row
from posttrain.data.hygiene.duplicates import THRESHOLD, find_duplicates
from posttrain.data.hygiene.keys import Key, key_of
from posttrain.data.hygiene.rows import RowStream, format_of
from posttrain.data.hygiene.token_checks import TokenChecks, TokenReport
from posttrain.data.loader import EMPTY_ANSWER, EMPTY_PROMPT, MAX_EMPTY_SHARE, problem_of
from posttrain.data.records import Row
from posttrain.data.summary import quantiles
from posttrain.errors import DataError

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
