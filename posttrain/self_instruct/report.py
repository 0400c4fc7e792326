"""What a run has made: report.json, and the same for the eye.

What instructions ask for: their root verb and its object, by rules of thumb.

Self-Instruct's paper takes both from a parser. Here an instruction is read from its start: what
may stand before an imperative is passed over ("Given the text, …", "Please", "Can you"), the next
word is the verb, unless it is a question word; the noun is the last word of the first run of
content words after it. `Write a short poem about the sea` gives (write, poem). Some pairs are
wrong; for counting how varied a few hundred instructions are, they do.
"""

import dataclasses
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.summary import quantiles
from posttrain.run.console import is_main_process, say
from posttrain.self_instruct.asking import Asker
from posttrain.self_instruct.filters import REASONS
from posttrain.self_instruct.methods import Collection
from posttrain.self_instruct.tasks import Task

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


WORD = re.compile(r"[a-z][a-z'-]*|[,.;:?!]")
POLITE = {"please", "kindly", "now", "then", "next", "first", "briefly", "help", "me"}
QUESTION_WORDS = {
    "what", "which", "who", "whom", "whose", "when", "where", "why", "how", "is", "are", "was",
    "were", "do", "does", "did", "has", "have", "should", "would", "could", "can", "will", "may",
}  # fmt: skip
# A sentence that opens with one of these has its imperative after the first comma.
OPENERS = {
    "given", "in", "for", "from", "using", "with", "if", "based", "imagine", "suppose", "as",
    "you", "your", "here", "the", "this", "these", "below", "i", "my", "we", "a", "an", "there",
    "after", "before", "without", "to", "on", "at", "pretend", "assume", "out", "of",
}  # fmt: skip
# Between a verb and its object, or after the object: never a noun.
FUNCTION_WORDS = QUESTION_WORDS | {
    "a", "an", "the", "this", "that", "these", "those", "each", "every", "all", "any", "some",
    "both", "another", "other", "no", "one", "two", "three", "four", "five", "six", "seven",
    "eight", "nine", "ten", "my", "your", "his", "her", "its", "our", "their", "me", "you", "him",
    "it", "us", "them", "i", "we", "he", "she", "they", "of", "in", "on", "at", "to", "for",
    "from", "with", "without", "about", "into", "by", "as", "between", "through", "over", "under",
    "up", "out", "down", "off", "and", "or", "but", "so", "if", "whether", "than", "be", "been",
    "not", "only", "following", "given", "below", "above", "after", "before", "during", "using",
    "against", "per", "there", "here", "more", "most", "such", "own", "must", "within", "while",
    "because", "since", "until", "s", "also", "just", "very",
}  # fmt: skip
PUNCTUATION = set(",.;:?!")


def verb_and_noun(instruction: str) -> tuple[str, str]:
    """(root verb or question word, its object); "" for what is not found."""
    words = WORD.findall(instruction.lower())
    start = _imperative(words)
    if start is None:
        return "", ""
    return words[start], _object(words[start + 1 :])


def count_verbs(instructions: Iterable[str]) -> Counter[tuple[str, str]]:
    """How often each pair of verb and noun occurs."""
    return Counter(verb_and_noun(instruction) for instruction in instructions)


def _imperative(words: list[str]) -> int | None:
    """Place of the verb or question word that the sentence hangs on."""
    place = 0
    if words and words[0] in OPENERS:
        comma = words.index(",") if "," in words else -1
        place = comma + 1 if comma > 0 else 0
    if words[place + 1 : place + 2] == ["you"] and words[place] in QUESTION_WORDS:
        place += 2  # "can you …" asks for what follows
    while place < len(words) and (words[place] in POLITE or words[place] in PUNCTUATION):
        place += 1
    return place if place < len(words) else None


def _object(words: list[str]) -> str:
    """Last word of the first run of content words."""
    found = ""
    for word in words:
        if word not in FUNCTION_WORDS and word not in PUNCTUATION:
            found = word
        elif found:
            break
    return found


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
