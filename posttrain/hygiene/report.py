"""A check's report in words, for the terminal.

One example as training sees it: which tokens are trained, which are special, where each ends.

    print_example(find_row(stream, 17), tokenizer, need="documents")

The row goes through the very loader of the recipes. On a terminal trained tokens are green and
special ones reversed; elsewhere trained tokens stand between « and ».
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from posttrain.data.formats import LOADERS, PROMPTS
from posttrain.data.loading import MARKS
from posttrain.data.read import Records, Row
from posttrain.errors import ConfigError, DataError
from posttrain.hygiene.check import CheckReport, TokenReport
from posttrain.hygiene.rows import RowStream, format_of

MAX_SHOWN = 6  # columns' values or languages named in one line


def print_report(report: CheckReport, console: Any = None) -> None:
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
    """(what, finding), in the order of the report."""
    yield "formats", _counts(report.formats) or "none"
    yield (
        "columns",
        ", ".join(
            name if count == report.num_rows else f"{name} ({count / report.num_rows:.1%} filled)"
            for name, count in report.columns.items()
        ),
    )
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


def _token_lines(tokens: TokenReport) -> Iterator[tuple[str, str]]:
    yield "template", f"{tokens.template}; {tokens.num_refused:,} rows refused"
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


def _lengths(lengths: tuple[int, int, int], unit: str) -> str:
    return "median {:,}, 95 % up to {:,}, longest {:,} {}".format(*lengths, unit)


REPLACEMENT = "\ufffd"  # what an incomplete character is decoded to
BOUNDARY = "│"
MAX_TOKENS_OF_A_CHARACTER = 8


class Piece(NamedTuple):
    """The text of a token, or of several tokens that make one character."""

    text: str
    trained: bool
    special: bool


def find_row(stream: RowStream, number: int) -> Row:
    """The first row of that number (its line in JSONL)."""
    last = 0
    for row in stream:
        if row.number == number:
            return row
        last = row.number
    raise DataError(f"{stream.name}: no row {number}; the last one is row {last}.")


def tokens_of(
    row: Row, tokenizer: Any, *, need: str | None = None, template: str = "auto", max_length: int
) -> list[tuple[str, list[int], list[bool]]]:
    """(name, token ids, trained) of each part that a loader makes of the row.

    need: documents, pairs, …: a key of LOADERS; none: what the row's format gives first.
    """
    from posttrain import data

    given = format_of(row).gives
    if need is not None and need not in given:
        raise ConfigError(f"need: this row gives {' or '.join(given)}; found '{need}'.")
    need = need or given[0]
    limit = {"max_prompt_length" if need == PROMPTS else "max_length": max_length}
    load = getattr(data, LOADERS[need])
    records = Records(row.file, ((row.file, [row.number], [row.values]),))
    examples = load(records, tokenizer, template=template, say=_silent, **limit)
    return [part for example in examples for part in _parts(example)]


def _parts(example: dict[str, Any]) -> list[tuple[str, list[int], list[bool]]]:
    if "input_ids" in example:
        return [("document", example["input_ids"], example["trained"])]
    names = [name for name in example if name.endswith("_ids")]
    return [
        (name.removesuffix("_ids"), example[name], [name != "prompt_ids"] * len(example[name]))
        for name in names
    ]


def pieces_of(ids: list[int], trained: list[bool], tokenizer: Any) -> list[Piece]:
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
    parts: list[tuple[str, list[int], list[bool]]],
    tokenizer: Any,
    *,
    boundaries: bool = False,
    console: Any = None,
) -> None:
    """Print each part under its name. boundaries: a line between two tokens."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False, soft_wrap=True)
    in_colour = console.is_terminal and not console.no_color
    marks = ("", "") if in_colour else MARKS
    for name, ids, trained in parts:
        pieces = pieces_of(ids, trained, tokenizer)
        legend = "green: trained" if in_colour else f"{MARKS[0]}trained{MARKS[1]}"
        console.print(f"{name}: {len(ids):,} tokens, {sum(trained):,} trained ({legend})")
        text = Text()
        for place, piece in enumerate(pieces):
            was_trained = place > 0 and pieces[place - 1].trained
            if piece.trained != was_trained:
                text.append(marks[0] if piece.trained else marks[1])
            elif boundaries and place:
                text.append(BOUNDARY, style="dim")
            text.append(piece.text, style=_style(piece))
        if pieces and pieces[-1].trained:
            text.append(marks[1])
        console.print(text)


def _style(piece: Piece) -> str:
    styles = ["bold green"] * piece.trained + ["reverse"] * piece.special
    return " ".join(styles)


def _silent(_line: str) -> None:
    """For a loader whose report on a single row says nothing."""
