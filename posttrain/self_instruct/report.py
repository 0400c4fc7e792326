"""The report of a run: what was made of the answers, as files and as tables.

report = write_results(run, method, asker)    # records.jsonl, rejected.jsonl, report.json
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.loading import quantiles
from posttrain.run.folder import whole_file
from posttrain.run.options import is_main_process, say
from posttrain.self_instruct.asking import Asker, Usage
from posttrain.self_instruct.filters import REASONS
from posttrain.self_instruct.methods import Collection, Method
from posttrain.self_instruct.verbs import count_verbs

if TYPE_CHECKING:
    from rich.table import Table

NUM_PAIRS_KEPT, NUM_PAIRS_SHOWN = 100, 12


@dataclass(frozen=True)
class Lengths:
    """Lengths in words; p50 and p95 are the median and the 95th percentile."""

    mean: float = 0
    p50: int = 0
    p95: int = 0
    max: int = 0


@dataclass
class UsageReport(Usage):
    """Sums over the answers, those that came from the log, and the cost at the given prices."""

    from_log: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class Report:
    """The contents of report.json.

    rejected: reason -> texts, in the order of REASONS. stopped: why the run ended early. words:
    lengths of instruction, input and output. verb_noun: (verb, noun, count), most frequent first.
    """

    kept: int
    rejected: dict[str, int]
    stopped: str
    with_input: int
    words: dict[str, Lengths]
    num_verbs: int
    num_verb_noun: int
    verb_noun: list[tuple[str, str, int]]
    usage: UsageReport | None = None


def write_results(run: Path, method: Method, asker: Asker) -> Report:
    """Write records.jsonl, rejected.jsonl and report.json after the asking has ended.

    All three are made anew from requests.jsonl each time, each whole or not at all. If an error
    ended the asking, it is raised after everything is written; if nothing was answered before it,
    nothing is written.
    """
    if asker.error and not asker.budget.spent.num_requests:
        raise asker.error
    spent = dataclasses.asdict(asker.budget.spent)
    usage = UsageReport(**spent, from_log=asker.num_from_log, cost=asker.budget.cost)
    report = make_report(method.made, stopped=asker.stopped or method.stopped, usage=usage)
    _write(run / "records.jsonl", (task.record for task in method.made.records))
    _write(run / "rejected.jsonl", map(dataclasses.asdict, method.made.rejected))
    _write(run / "report.json", [dataclasses.asdict(report)], indent=2)
    if is_main_process():
        show_report(report)
    say(f"{report.kept:,} records: {run / 'records.jsonl'}")
    if report.stopped and not asker.error:
        say(f"stopped before there were {method.num_records:,}: {report.stopped}")
    if asker.error:
        raise asker.error
    return report


def progress_line(method: Method, asker: Asker) -> str:
    """One line on a run under way: `request 120: 1,404 kept, 512 rejected, 310,000 tokens`."""
    made, spent = method.made, asker.budget.spent
    cost = f", cost {asker.budget.cost:,.2f}" if asker.budget.cost else ""
    return (
        f"request {spent.num_requests:,}: {len(made.records):,} kept, "
        f"{len(made.rejected):,} rejected, {spent.tokens:,} tokens{cost}"
    )


def make_report(made: Collection, *, stopped: str = "", usage: UsageReport | None = None) -> Report:
    """Kept and rejected by reason, lengths in words, and how varied the instructions are."""
    rejected = made.count_rejected()
    records = made.records
    pairs = count_verbs(task.instruction for task in records)
    return Report(
        kept=len(records),
        rejected={reason: rejected[reason] for reason in REASONS if rejected[reason]},
        stopped=stopped,
        with_input=sum(bool(task.input) for task in records),
        words={
            "instruction": _lengths(task.instruction for task in records),
            "input": _lengths(task.input for task in records if task.input),
            "output": _lengths(task.output for task in records),
        },
        num_verbs=len({verb for verb, _ in pairs}),
        num_verb_noun=len(pairs),
        verb_noun=[(*pair, count) for pair, count in pairs.most_common(NUM_PAIRS_KEPT)],
        usage=usage,
    )


def show_report(report: Report) -> None:
    """Print the report as tables."""
    from rich.console import Console

    console = Console(highlight=False)
    if report.usage:
        console.print(_table(("answers", ""), _in_words(report.usage)))
    total = report.kept + sum(report.rejected.values())
    counts = {"kept": report.kept, **report.rejected}
    shares = [(name, count, f"{count / max(1, total):.1%}") for name, count in counts.items()]
    console.print(_table(("items", "count", "share"), shares))
    lengths = [
        (name, f"{found.p50:,}", f"{found.p95:,}", f"{found.max:,}")
        for name, found in report.words.items()
    ]
    console.print(_table(("words", "p50", "p95", "max"), lengths))
    pairs = [(f"{verb} {noun}", n) for verb, noun, n in report.verb_noun[:NUM_PAIRS_SHOWN]]
    title = f"{report.num_verbs} verbs, {report.num_verb_noun} with their nouns"
    console.print(_table((title, "count"), pairs))


def _lengths(texts: Iterable[str]) -> Lengths:
    words = [len(text.split()) for text in texts]
    return Lengths(round(statistics.mean(words), 1), *quantiles(words)) if words else Lengths()


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    from rich.table import Table

    table = Table(*header, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(str, row))
    return table


def _in_words(usage: UsageReport) -> Iterator[tuple[str, str]]:
    retries = usage.num_sent - usage.num_requests
    yield (
        "requests",
        f"{usage.num_requests:,} ({usage.from_log:,} from the log, {retries:,} retries)",
    )
    yield "prompt tokens", f"{usage.prompt_tokens:,}"
    yield "completion tokens", f"{usage.completion_tokens:,}"
    if usage.num_failed:
        yield "without an answer", f"{usage.num_failed:,}"
    if usage.num_estimated:
        yield "tokens estimated", f"in {usage.num_estimated:,} answers, 4 characters a token"
    if usage.cost:
        yield "cost", f"{usage.cost:,.2f}"


def _write(path: Path, rows: Iterable[object], indent: int | None = None) -> None:
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, indent=indent) + "\n")
