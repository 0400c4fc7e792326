"""The files that a run of self-instruct leaves, and what it says at its end."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain.console import is_main_process, say
from posttrain.data.self_instruct.report import make_report, show_report
from posttrain.teachers.asking import Asker


def write_results(run: Path, method: Any, asker: Asker) -> dict[str, Any]:
    """records.jsonl, rejected.jsonl and report.json of a method that is through with asking.

    All three are made anew from requests.jsonl each time, each whole or not at all. Returns the
    report. Raises the error that ended the asking, if one did, after everything is written;
    if nothing was answered before it, nothing is.
    """
    if asker.error and not asker.budget.spent.num_requests:
        raise asker.error
    made, spent = method.made, asker.budget.spent
    report = make_report(made, stopped=asker.stopped or method.stopped)
    report["usage"] = {
        **dataclasses.asdict(spent),
        "from_log": asker.num_from_log,
        "cost": asker.budget.cost,
    }
    _write(run / "records.jsonl", (task.record for task in made.records))
    _write(run / "rejected.jsonl", made.rejected)
    _write(run / "report.json", [report], indent=2)
    if is_main_process():
        show_report(report, _in_words(asker))
    say(f"{len(made.records):,} records: {run / 'records.jsonl'}")
    if report["stopped"] and not asker.error:
        say(f"stopped before there were {method.num_records:,}: {report['stopped']}")
    if asker.error:
        raise asker.error
    return report


def progress_line(method: Any, asker: Asker) -> str:
    """`request 120: 1,404 kept, 512 rejected, 310,000 tokens`"""
    made, spent = method.made, asker.budget.spent
    cost = f", cost {asker.budget.cost:,.2f}" if asker.budget.cost else ""
    return (
        f"request {spent.num_requests:,}: {len(made.records):,} kept, "
        f"{len(made.rejected):,} rejected, {spent.tokens:,} tokens{cost}"
    )


def _in_words(asker: Asker) -> dict[str, str]:
    spent = asker.budget.spent
    words = {
        "requests": f"{spent.num_requests:,} ({asker.num_from_log:,} from the log, "
        f"{spent.num_sent - spent.num_requests:,} retries)",
        "prompt tokens": f"{spent.prompt_tokens:,}",
        "answer tokens": f"{spent.completion_tokens:,}",
    }
    if spent.num_failed:
        words["without an answer"] = f"{spent.num_failed:,}"
    if spent.num_estimated:
        words["tokens estimated"] = f"in {spent.num_estimated:,} answers, 4 characters a token"
    if asker.budget.cost:
        words["cost"] = f"{asker.budget.cost:,.2f}"
    return words


def _write(path: Path, rows: Iterable[Any], indent: int | None = None) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, indent=indent) + "\n")
    os.replace(partial, path)
