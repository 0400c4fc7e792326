"""Report and show: a check's findings in words, and one row as training sees it.

    print_report(check(stream, tokenizer=tokenizer))

    parts = tokens_of(find_row(stream, 17), tokenizer, need="documents", max_length=2048)
    print_example(parts, tokenizer)

A row that is shown goes through the very loader of the recipes. On a terminal trained tokens are
green and special ones reversed; elsewhere trained tokens stand between « and ».
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.data.formats import DOCUMENTS, PAIRS, PROMPTS, STEPS, UNPAIRED
from posttrain.data.load import MARKS
from posttrain.data.read import FileRows, Records, Row
from posttrain.errors import ConfigError, DataError
from posttrain.hygiene.check import CheckReport, Lengths, TokenReport
from posttrain.hygiene.rows import RowStream, format_of

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

MAX_SHOWN = 6  # columns' values or languages named in one line
REPLACEMENT = "\ufffd"  # what an incomplete character is decoded to
BOUNDARY = "│"
MAX_TOKENS_OF_A_CHARACTER = 8


class Part(NamedTuple):
    """A column of token ids that a loader makes, and which of the tokens are trained."""

    name: str
    ids: list[int]
    trained: list[bool]


class Piece(NamedTuple):
    """The text of a token, or of several tokens that make one character."""

    text: str
    trained: bool
    special: bool


def print_report(report: CheckReport, console: Console | None = None) -> None:
    """Print a check's findings as a table, then what would break training."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in lines_of(report):
        table.add_row(name, Text(value))  # not markup: file names may hold brackets
    console.print(f"{report.source}: {report.num_rows:,} rows", markup=False)
    console.print(table)
    for sentence in report.breaks:
        console.print(f"This would break training: {sentence}", style="bold red", markup=False)
    if not report.breaks:
        console.print("Nothing found that would break training.", style="green")


def lines_of(report: CheckReport) -> Iterator[tuple[str, str]]:
    """The table's lines: what was looked at, and what was found."""
    yield "formats", _counts(report.formats) or "none"
    yield (
        "columns",
        ", ".join(
            name if count == report.num_rows else f"{name} ({count / report.num_rows:.1%} filled)"
            for name, count in report.columns.items()
        ),
    )
    yield "columns not used", ", ".join(report.unused) or "none"
    yield "unreadable rows", f"{report.unreadable.count:,}"
    yield "left out by the loaders", _dropped(report)
    yield "duplicates", _duplicates(report)
    yield "prompts", _lengths(report.prompt_chars, "characters")
    yield "answers", _lengths(report.answer_chars, "characters")
    shares = list(report.languages.items())[:MAX_SHOWN]
    yield "languages (of a sample)", ", ".join(f"{name} {share:.1%}" for name, share in shares)
    yield "licence", _licences(report)
    if report.tokens is None:
        yield "template, mask, tokens", "not checked: name a --tokenizer"
    else:
        yield from _token_lines(report.tokens)


def find_row(stream: RowStream, number: int) -> Row:
    """The first row of that number (its line in JSONL); DataError if there is none."""
    last = 0
    for row in stream:
        if row.number == number:
            return row
        last = row.number
    raise DataError(f"{stream.name}: no row {number}; the last one is row {last}.")


def tokens_of(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    need: str | None = None,
    template: str = "auto",
    max_length: int,
) -> list[Part]:
    """The columns of token ids that a loader makes of the row.

    need: a key of NEEDS; None: what the row's format gives first.
    """
    given = format_of(row).gives
    if need is not None and need not in given:
        raise ConfigError(f"need: this row gives {' or '.join(given)}; found '{need}'.")
    need = need or given[0]
    examples = _load(row, tokenizer, need, template=template, max_length=max_length)
    return [part for example in examples for part in _parts(example)]


def _load(
    row: Row, tokenizer: PreTrainedTokenizerBase, need: str, *, template: str, max_length: int
) -> Dataset:
    from posttrain import data

    loaders = {
        DOCUMENTS: data.load_documents,
        PAIRS: data.load_pairs,
        PROMPTS: data.load_prompts,
        UNPAIRED: data.load_unpaired,
        STEPS: data.load_steps,
    }
    limit = {"max_prompt_length" if need == PROMPTS else "max_length": max_length}
    records = Records(row.file, (FileRows(row.file, lambda: iter([(row.number, row.values)])),))
    return loaders[need](records, tokenizer, template=template, say=_say_nothing, **limit)


def _parts(example: dict[str, Any]) -> list[Part]:
    if "input_ids" in example:
        return [Part("document", example["input_ids"], example["trained"])]
    names = [name for name in example if name.endswith("_ids")]
    return [
        Part(name.removesuffix("_ids"), example[name], [name != "prompt_ids"] * len(example[name]))
        for name in names
    ]


def pieces_of(
    ids: list[int], trained: list[bool], tokenizer: PreTrainedTokenizerBase
) -> list[Piece]:
    """The tokens' texts; tokens that only together make a character are one piece."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        is_open = text.endswith(REPLACEMENT) and end - start < MAX_TOKENS_OF_A_CHARACTER
        if is_open and end < len(ids) and trained[end] == trained[start]:
            continue
        pieces.append(Piece(text, trained[start], ids[start] in special))
        start = end
    return pieces


def print_example(
    parts: list[Part],
    tokenizer: PreTrainedTokenizerBase,
    *,
    boundaries: bool = False,
    console: Console | None = None,
) -> None:
    """Print each part under its name. boundaries: a line between two tokens."""
    from rich.console import Console

    console = console or Console(highlight=False, soft_wrap=True)
    in_colour = console.is_terminal and not console.no_color
    marks = ("", "") if in_colour else MARKS
    for name, ids, trained in parts:
        legend = "green: trained" if in_colour else f"{MARKS[0]}trained{MARKS[1]}"
        console.print(f"{name}: {len(ids):,} tokens, {sum(trained):,} trained ({legend})")
        pieces = pieces_of(ids, trained, tokenizer)
        console.print(_marked_text(pieces, marks, boundary=BOUNDARY if boundaries else ""))


def _marked_text(pieces: list[Piece], marks: tuple[str, str], *, boundary: str) -> Text:
    from rich.text import Text

    text = Text()
    for place, piece in enumerate(pieces):
        was_trained = place > 0 and pieces[place - 1].trained
        if piece.trained != was_trained:
            text.append(marks[0] if piece.trained else marks[1])
        elif place:
            text.append(boundary, style="dim")
        text.append(piece.text, style=_style(piece))
    if pieces and pieces[-1].trained:
        text.append(marks[1])
    return text


def _style(piece: Piece) -> str:
    styles = ["bold green"] * piece.trained + ["reverse"] * piece.special
    return " ".join(styles)


def _say_nothing(_line: str) -> None:
    """Drop a loader's summary, which says nothing about a single row."""


def _token_lines(tokens: TokenReport) -> Iterator[tuple[str, str]]:
    yield "template", f"{tokens.template}; {tokens.num_refused:,} rows refused"
    control = tokens.control
    first = f" (first: {control.first})" if control.count else ""
    yield "control tokens in the text", f"{control.count:,} rows{first}"
    yield "examples", _lengths(tokens.lengths, "tokens")
    if tokens.num_tokens:
        share = tokens.num_trained / tokens.num_tokens
        yield "trained", f"{tokens.num_trained:,} of {tokens.num_tokens:,} tokens ({share:.1%})"
    limit = f"{tokens.max_length:,} tokens"
    yield f"longer than {limit}", f"{tokens.num_too_long:,} of {tokens.num_examples:,} examples"
    yield "without a target there", f"{tokens.num_untrained:,}"
    yield "without an end token trained", f"{tokens.num_unended:,}"


def _dropped(report: CheckReport) -> str:
    lines = [
        f"{places.count:,} {reason} (first: {places.first})"
        for reason, places in report.dropped.items()
    ]
    return "\n".join(lines) or "0"


def _duplicates(report: CheckReport) -> str:
    near = "near ones not looked for" if report.num_near is None else f"{report.num_near:,} near"
    return f"{report.num_exact:,} exact, {near} (by prompt)"


def _licences(report: CheckReport) -> str:
    if not report.licences:
        return "no column license, licence or source"
    return "\n".join(f"{name}: {_counts(values)}" for name, values in report.licences.items())


def _counts(counts: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:MAX_SHOWN]]
    more = len(counts) - MAX_SHOWN
    return ", ".join(shown + [f"and {more} more"] * (more > 0))


def _lengths(lengths: Lengths, unit: str) -> str:
    return "median {:,}, 95 % up to {:,}, longest {:,} {}".format(*lengths, unit)
