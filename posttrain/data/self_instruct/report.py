"""What a run has made: report.json, and the same for the eye."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.data.self_instruct.collecting import Collection
from posttrain.data.self_instruct.diversity import count_verbs
from posttrain.data.self_instruct.filters import REASONS
from posttrain.data.self_instruct.tasks import Task
from posttrain.data.summary import quantiles

NUM_PAIRS_KEPT, NUM_PAIRS_SHOWN = 100, 12


def make_report(made: Collection, *, stopped: str = "") -> dict[str, Any]:
    """Kept and rejected by reason, lengths in words, and how varied the instructions are."""
    rejected = made.count_rejected()
    records = made.records
    return {
        "kept": len(records),
        "rejected": {reason: rejected[reason] for reason in REASONS if rejected[reason]},
        "stopped": stopped,
        "with_input": sum(bool(task.input) for task in records),
        "words": {
            "instruction": _lengths(task.instruction for task in records),
            "input": _lengths(task.input for task in records if task.input),
            "output": _lengths(task.output for task in records),
        },
        **_diversity(records),
    }


def show_report(report: dict[str, Any], usage: dict[str, Any]) -> None:
    """Print both as tables. usage: what the answers took, in words for the first table."""
    from rich.console import Console

    console = Console(highlight=False)
    total = report["kept"] + sum(report["rejected"].values())
    console.print(_table("answers", "", usage.items()))
    counts = {"kept": report["kept"], **report["rejected"]}
    shares = [(name, count, f"{count / max(1, total):.1%}") for name, count in counts.items()]
    console.print(_table("items", "count", shares, "share"))
    lengths = [
        (name, *(f"{found[key]:,}" for key in ("p50", "p95", "max")))
        for name, found in report["words"].items()
    ]
    console.print(_table("words", "p50", lengths, "p95", "max"))
    pairs = [(f"{v} {n}", c) for v, n, c in report["verb_noun"][:NUM_PAIRS_SHOWN]]
    title = f"{report['num_verbs']} verbs, {report['num_verb_noun']} with their nouns"
    console.print(_table(title, "count", pairs))


def _diversity(records: Sequence[Task]) -> dict[str, Any]:
    """Distinct verbs and pairs, and the most frequent pairs."""
    pairs = count_verbs(task.instruction for task in records)
    return {
        "num_verbs": len({verb for verb, _ in pairs}),
        "num_verb_noun": len(pairs),
        "verb_noun": [[*pair, count] for pair, count in pairs.most_common(NUM_PAIRS_KEPT)],
    }


def _lengths(texts: Iterable[str]) -> dict[str, float]:
    words = [len(text.split()) for text in texts]
    if not words:
        return {"mean": 0, "p50": 0, "p95": 0, "max": 0}
    middle, high, most = quantiles(words)
    return {"mean": round(statistics.mean(words), 1), "p50": middle, "p95": high, "max": most}


def _table(title: str, column: str, rows: Iterable[Sequence[Any]], *more: str) -> Any:
    from rich.table import Table

    table = Table(title, *(name for name in (column, *more)), box=None, header_style="bold")
    for place in range(1, len(table.columns)):
        table.columns[place].justify = "right"
    for row in rows:
        table.add_row(*map(str, row))
    return table
