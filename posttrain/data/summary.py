"""What a loader says: one line about the whole, then the first example, its targets marked."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
