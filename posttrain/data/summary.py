"""The summary of a load: one line about the whole, and the first example with its targets marked.

announce(summary_line(tally, num_kept=2, kept="documents"), [("q", False), ("a", True)], None)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from posttrain.data.example import Example
from posttrain.data.formats import DOCUMENTS

MAX_RUN_CHARS, MAX_RUNS = 320, 8  # of the first example
MARKS = ("«", "»")  # around trained text

Say = Callable[[str], None]
Run = tuple[str, bool]  # decoded text, and whether the model is trained on it


@dataclass
class Tally:
    """Counts over one load. `lengths`: tokens of each example before the limit."""

    source: str
    format: str
    columns: list[str]
    template: str
    num_rows: int
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> file and row of each
    lengths: list[int] = field(default_factory=list)
    num_truncated: int = 0
    num_unended: int = 0  # truncated documents that no longer close with an end token
    golds: dict[str, int] = field(default_factory=dict)  # rule -> examples
    rules: dict[str, int] = field(default_factory=dict)  # rule that found the targets -> turns
    noted: dict[str, list[str]] = field(default_factory=dict)  # likewise; these are kept

    def drop(self, reason: str, where: str) -> None:
        """Count an example that is left out."""
        self.dropped.setdefault(reason, []).append(where)

    def count_gold(self, example: Example) -> None:
        """Count the rule that found the example's reference answer, if it has one."""
        if example.gold is not None:
            self.golds[example.gold_rule] = self.golds.get(example.gold_rule, 0) + 1

    @property
    def num_dropped(self) -> int:
        """Number of examples that were left out, for whatever reason."""
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
    if kept == DOCUMENTS:
        parts.append(f"{100 * tally.num_truncated / num_kept:.1f}% truncated")
    if tally.num_unended:
        parts[-1] += f", {tally.num_unended:,} of them without an end token"
    return "; ".join(parts)


def marked_example(
    runs: Sequence[Run],
    *,
    marks: tuple[str, str] = MARKS,
    escape: Callable[[str], str] = str,
) -> str:
    """The runs on one line, trained ones between the marks, long ones with their middle cut."""
    shown = []
    for text, trained in runs[:MAX_RUNS]:
        text = escape(_shortened(text).replace("\n", "↵"))
        shown.append(f"{marks[0]}{text}{marks[1]}" if trained else text)
    if len(runs) > MAX_RUNS:
        shown.append(f" … and {len(runs) - MAX_RUNS} more pieces")
    return "".join(shown)


def announce(line: str, first: Sequence[Run], say: Say | None) -> None:
    """Report the summary and the first example, on the main process only.

    say: called with each line; None prints, in colour on a terminal.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if say is None and sys.stdout.isatty():
        _print_in_colour(line, first)
        return
    say = say or _print
    say(line)
    note = f" (trained between {MARKS[0]} {MARKS[1]})" if any(t for _, t in first) else ""
    say(f"first example{note}: {marked_example(first)}")


def _reasons(tally: Tally, rows_of: dict[str, list[str]]) -> str:
    """Number of rows and the first of them for each reason."""
    return ", ".join(
        f"{len(rows):,} {reason} (first: {rows[0].removeprefix(f'{tally.source}, ')})"
        for reason, rows in rows_of.items()
    )


def _print_in_colour(line: str, first: Sequence[Run]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(escape(line))
    example = marked_example(first, marks=("[bold green]", "[/]"), escape=escape)
    note = " (trained tokens in [bold green]green[/])" if any(t for _, t in first) else ""
    console.print(f"first example{note}: {example}")


def _print(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal without « must not end the run
    print(line.encode(encoding, "replace").decode(encoding), flush=True)


def _shortened(text: str) -> str:
    half = MAX_RUN_CHARS // 2
    return text if len(text) <= MAX_RUN_CHARS else f"{text[:half]} … {text[-half:]}"
