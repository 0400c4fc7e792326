"""A check's report in words, for the terminal."""

from collections.abc import Iterator
from typing import Any

from posttrain.data.hygiene.checking import CheckReport
from posttrain.data.hygiene.token_checks import TokenReport

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
