"""Loader: what all loaders share, from rows to checked token ids, with a count of what was lost.

    loader = Loader(source, tokenizer, PAIRS, template="auto", limit=2048, split="train")
    for exchange in loader.exchanges():
        loader.admit(exchange.example, …)

Every example is either kept or counted as dropped under a reason, for the summary line.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from posttrain.data.encode import (
    Columns,
    Document,
    Encoder,
    Kind,
    Truncation,
    cut,
    without_spelling_marks,
)
from posttrain.data.example import DroppedRow, Example, Places
from posttrain.data.formats import (
    DOCUMENTS,
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    NEEDS,
    PROMPTS,
    Format,
    detect_format,
    parse_row,
    reason_to_drop,
    unused_columns,
)
from posttrain.data.images import GetProcessor, ImageReader
from posttrain.data.read import Records, Row, Source, open_records
from posttrain.data.render import PromptTemplate, Renderer, choose_template, is_ready
from posttrain.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

BLOCK_EXAMPLES = 1024  # tokenised in one call: enough to keep the tokenizer's threads busy
MIN_KEPT_BYTES = 8_000_000  # of data that cache.py keeps; less is prepared in a few seconds
MAX_EMPTY_SHARE = 0.01  # a few empty answers are noise in the data; more are a mistake
CONTROL = "with control tokens spelled out in their text, which stay text"
CONTROL_KEPT = (
    "with control tokens spelled out in their text, which the tokenizer takes for its own under "
    "template plain"
)
JOINED = (
    "whose prompt, tokenised together with its answer, would not end where the answer begins: "
    "tokenised apart"
)


class RenderedPrompt(NamedTuple):
    """A prompt as text and as token ids."""

    row: Row
    example: Example
    text: str
    ids: list[int]


class Exchange(NamedTuple):
    """Token ids of a prompt and of each of its completions, tokenised apart."""

    row: Row
    example: Example
    prompt: list[int]
    answers: list[list[int]]


class Made(NamedTuple):
    """The examples of a load, and its report: a line, and the first example."""

    columns: Columns
    line: str
    first: list[Run]

    def in_memory(self) -> tuple[Dataset, str, list[Run]]:
        """The same with a dataset."""
        return self.columns.dataset(), self.line, self.first


class Loader:
    """One load. Its iterators read the rows once; `tally` counts what they meet.

    need: a key of NEEDS. limit: tokens of an example at most. option: a setting of the one loader.
    processor: see load_documents. path: the file that columns go to; None: memory.

    Raises DataError for data, ConfigError for a template, that cannot be used.
    """

    def __init__(
        self,
        source: Source | Records,
        tokenizer: PreTrainedTokenizerBase,
        need: str,
        *,
        template: str | PromptTemplate,
        limit: int,
        split: str | None,
        option: str | bool = "",
        processor: GetProcessor | None = None,
    ) -> None:
        self.records = source if isinstance(source, Records) else open_records(source, split=split)
        self.need, self.template, self.limit, self.option = need, template, limit, option
        self.tokenizer, self.encoder = tokenizer, Encoder(tokenizer)
        self.processor, self.teaches_end = processor, False
        self.path: Path | None = None

    @property
    def is_worth_keeping(self) -> bool:
        """True for much data on disk under a template that cache.py can tell from others."""
        sizes = [path.stat().st_size for part in self.records.files for path in part.paths]
        return sum(sizes) >= MIN_KEPT_BYTES and isinstance(self.template, str)

    @cached_property
    def format(self) -> Format:
        """The format of the rows; a first pass over them finds it."""
        return detect_format(self.records.counted(), self.need)

    @cached_property
    def images(self) -> ImageReader | None:
        """The reader of images, where rows may have some and the model sees them."""
        has_some = self.processor is not None and "images" in self.records.counted().columns
        return ImageReader(self.processor) if has_some else None

    @cached_property
    def renderer(self) -> Renderer:
        """The template."""
        default = NEEDS[self.need].template
        found = choose_template(self.template, self.tokenizer, self.format, default=default)
        return self.images.rendering(found) if self.images else found

    @cached_property
    def tally(self) -> Tally:
        """The counts of this load."""
        has_unused = self.need != PROMPTS  # whose other columns are for the rewards
        return Tally(
            source=self.records.source,
            format=self.format.name,
            columns=list(self.format.columns),
            template=self.renderer.name,
            num_rows=len(self.records),
            rules=self.renderer.rules,
            noted=self.renderer.noted,
            unused=unused_columns(self.format, self.records.columns) if has_unused else [],
        )

    def columns(self, kinds: Mapping[str, Kind]) -> Columns:
        """Empty columns for what is kept; those of `seen` come last."""
        return Columns(kinds | ({"images": "images"} if self.images else {}), self.path)

    def seen(self, example: Example) -> list[list[dict]]:
        """The values of the column of images, if there is one."""
        return [list(example.images)] if self.images else []

    def prompts(self, *, as_recorded: bool = False) -> Iterator[RenderedPrompt]:
        """Each example's prompt. as_recorded: as if read from a record of its bare prompt."""
        for block in self._blocks():
            examples = [e.as_recorded() if as_recorded else e for _, e in block]
            texts = [self.renderer.prompt(example) for example in examples]
            ids = self._prompt_ids(texts)
            texts = map(without_spelling_marks, texts)
            yield from map(RenderedPrompt, [row for row, _ in block], examples, texts, ids)

    def exchanges(self) -> Iterator[Exchange]:
        """Each example's prompt and completions."""
        for block in self._blocks():
            prompts = [self.renderer.prompt(example) for _, example in block]
            answers = [self.renderer.answers(example) for _, example in block]
            each = zip(block, prompts, answers, strict=True)
            self._note_joined(
                [(e, prompt, text) for (_, e), prompt, texts in each for text in texts]
            )
            ids = iter(self.encoder.answers([text for texts in answers for text in texts]))
            encoded = zip(block, self._prompt_ids(prompts), answers, strict=True)
            for (row, example), prompt_ids, texts in encoded:
                yield Exchange(row, example, prompt_ids, [next(ids) for _ in texts])

    def documents(self) -> Iterator[tuple[Example, Document]]:
        """Each document with its example, which may make several."""
        for block in self._blocks():
            each = [(e, segments) for _, e in block for segments in self.renderer.documents(e)]
            boundaries = [
                (example, before.text, segment.text)
                for example, segments in each
                for before, segment in pairwise(segments)
                if segment.trained and before.text
            ]
            self._note_joined(boundaries)
            segments = [segments for _, segments in each]
            documents = self.encoder.documents(segments, add_bos=self.renderer.adds_bos)
            yield from zip([example for example, _ in each], documents, strict=True)

    def admit(self, example: Example, prompt_ids: Sequence[int], length: int) -> bool:
        """Count an example of `length` tokens; False, and counted as dropped, if it cannot stay."""
        self.tally.lengths.append(length)
        if not prompt_ids:  # nothing could predict the answer's first token
            self.tally.drop(EMPTY_PROMPT, example.where)
            return False
        if length > self.limit:
            self.tally.drop(f"longer than {self.limit:,} tokens", example.where)
            return False
        return True

    def truncate_or_drop(
        self, example: Example, document: Document, truncation: Truncation
    ) -> Document | None:
        """Count a document and cut it to the limit; None, and counted as dropped, if none is left.

        A document in which no target remains is dropped.
        """
        length = len(document[0])
        self.tally.lengths.append(length)
        kept = cut(document, self.limit, truncation, self.tokenizer.bos_token_id)
        if kept is None:
            self.tally.drop(f"longer than {self.limit:,} tokens", example.where)
            return None
        if not any(kept[1]):
            self.tally.drop("without a target within max_length", example.where)
            return None
        if length > self.limit:
            self.tally.num_truncated += 1
            self.tally.num_unended += kept[0][-1] not in self.encoder.end_ids
        if not self.teaches_end:
            self.teaches_end = not self.encoder.end_ids.isdisjoint(compress(*kept))
        return kept

    def refuse_empty(self, num_kept: int) -> None:
        """Raise DataError, with the reasons, if no row is left."""
        if num_kept:
            return
        reasons = ", ".join(f"{p.count:,} {reason}" for reason, p in self.tally.dropped.items())
        lengths = ""
        if self.tally.lengths:
            middle, _, longest = quantiles(self.tally.lengths)
            limit = f"{NEEDS[self.need].limit}={self.limit}"
            lengths = f" Their lengths: median {middle:,}, longest {longest:,} tokens; {limit}."
        raise DataError(
            f"{self.records.source}: none of {self.tally.num_rows:,} rows can be used as "
            f"{self.need} ({reasons}).{lengths} Raise the limit or fix the rows."
        )

    def refuse_endless(self) -> None:
        """Raise DataError if no kept document has an end token among its trained ids."""
        if self.teaches_end:
            return
        raise DataError(
            f"{self.records.source}: no document keeps its end-of-sequence token within "
            f"max_length={self.limit}, so the model could not learn to stop. Raise max_length, or "
            "cut the documents into shorter ones."
        )

    def made(self, columns: Columns, first: list[Run], *, detail: str = "") -> Made:
        """The finished load. detail: for the report, after the number of what was kept."""
        first = [(self.images.collapsed(x), t) for x, t in first] if self.images else first
        return Made(columns, summary_line(self.tally, len(columns), self.need + detail), first)

    def _blocks(self) -> Iterator[list[tuple[Row, Example]]]:
        """The examples that have what is needed, about BLOCK_EXAMPLES at a time."""
        block: list[tuple[Row, Example]] = []
        self.tally  # noqa: B018  (no row is looked at before format and template are settled)
        for row in self.records:
            block += [(row, example) for example in self._examples(row)]
            if len(block) >= BLOCK_EXAMPLES:
                yield block
                block = []
        if block:
            yield block
        self._refuse_many_empty()

    def _examples(self, row: Row) -> list[Example]:
        try:
            examples = parse_row(self.format, row, self.images)
        except DroppedRow as reason:
            self.tally.drop(str(reason), row.where)
            return []
        kept = []
        for example in examples:
            as_text = self.encoder.as_text(example)  # the same object without control tokens
            ready = is_ready(self.renderer, example)
            used = example if ready else as_text
            if reason := reason_to_drop(used, self.need):
                self.tally.drop(reason, row.where)
                continue
            kept.append(used)
            if as_text is not example:
                note = CONTROL_KEPT if ready else CONTROL
                self.tally.noted.setdefault(note, Places()).add(example.where)
        return kept

    def _refuse_many_empty(self) -> None:
        for reason in (EMPTY_ANSWER, EMPTY_PROMPT):
            dropped = self.tally.dropped.get(reason, Places())
            if dropped.count > MAX_EMPTY_SHARE * len(self.records):
                raise DataError(
                    f"{self.records.source}: {dropped.count:,} of {len(self.records):,} rows come "
                    f"{reason} (first: {dropped.first}). Up to {MAX_EMPTY_SHARE:.0%} are dropped; "
                    "more are taken for a mistake. Fill or remove them."
                )

    def _prompt_ids(self, texts: list[str]) -> list[list[int]]:
        return self.encoder.prompts(texts, add_bos=self.renderer.adds_bos)

    def _note_joined(self, boundaries: Sequence[tuple[Example, str, str]]) -> None:
        """Note the examples in which a prompt would share a token with the answer after it."""
        joined = self.encoder.joins([(prompt, answer) for _, prompt, answer in boundaries])
        rows = [e.where for (e, *_), joins in zip(boundaries, joined, strict=True) if joins]
        for row in dict.fromkeys(rows):
            self.tally.noted.setdefault(JOINED, Places()).add(row)


Run = tuple[str, bool]  # decoded text, and whether the model is trained on it


@dataclass
class Tally:
    """Counts over one load. `lengths`: tokens of each example before the limit."""

    source: str
    format: str
    columns: list[str]
    template: str
    num_rows: int
    dropped: dict[str, Places] = field(default_factory=dict)  # reason -> rows
    lengths: array[int] = field(default_factory=lambda: array("q"))
    num_truncated: int = 0
    num_unended: int = 0  # truncated documents that no longer close with an end token
    golds: dict[str, int] = field(default_factory=dict)  # rule -> examples
    rules: dict[str, int] = field(default_factory=dict)  # rule that found the targets -> turns
    noted: dict[str, Places] = field(default_factory=dict)  # likewise; these are kept
    unused: list[str] = field(default_factory=list)  # columns of which nothing is read

    def drop(self, reason: str, where: str) -> None:
        """Count an example that is left out."""
        self.dropped.setdefault(reason, Places()).add(where)

    def count_gold(self, example: Example) -> None:
        """Count the rule that found the example's reference answer, if it has one."""
        if example.gold is not None:
            self.golds[example.gold_rule] = self.golds.get(example.gold_rule, 0) + 1

    @property
    def num_dropped(self) -> int:
        """Number of examples that were left out, for whatever reason."""
        return sum(places.count for places in self.dropped.values())


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
    if tally.unused:
        parts.append(f"columns not used: {', '.join(tally.unused)}")
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
    if kept == DOCUMENTS:
        parts.append(f"{100 * tally.num_truncated / num_kept:.1f}% truncated")
    if tally.num_unended:
        parts[-1] += f", {tally.num_unended:,} of them without an end token"
    return "; ".join(parts)


def _reasons(tally: Tally, places_of: dict[str, Places]) -> str:
    """Number of rows and the first of them for each reason."""
    return ", ".join(
        f"{places.count:,} {reason} (first: {places.first.removeprefix(f'{tally.source}, ')})"
        for reason, places in places_of.items()
    )
