"""Turn sampled completions into files of SFT records and preference pairs, and report the rest.

    report = write_selection(run, keep=best, pair=best_against_worst, right_by="accuracy")

Reads `answers.jsonl` of a run folder (sample.py), writes `records.jsonl` (prompt, completion),
`pairs.jsonl` (prompt, chosen, rejected, margin) and, last, `report.json`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.run.folder import whole_files
from posttrain.run.options import say
from posttrain.selection.rules import Completions, PairRule, Rule, first_of_equals

ANSWERS, RECORDS, PAIRS, REPORT = "answers.jsonl", "records.jsonl", "pairs.jsonl", "report.json"
# Columns of the data that belong to the prompt, and are written wherever it is.
PROMPT_COLUMNS = ("tools", "chat_template_kwargs")
WRONG, RIGHT = "wrong", "right, but not what the rule keeps"


@dataclass(frozen=True)
class Selection:
    """The records and pairs made of one prompt's completions.

    Attributes:
        left_out: Reason -> number of completions that are in no record for that reason.
        without_record: Why there is no record; "" if there is one.
        without_pair: Why there is no pair; "" if there is one.
    """

    records: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    left_out: Counter[str] = field(default_factory=Counter)
    without_record: str = ""
    without_pair: str = ""


def select(
    group: dict[str, Any],
    *,
    keep: Rule,
    pair: PairRule,
    right_by: str,
    min_reward: float = 1.0,
) -> Selection:
    """Apply the rules to one line of answers.jsonl.

    A pair's margin is the difference of its total rewards.

    Args:
        right_by: The reward, such as "accuracy", that decides which completions are right.
        min_reward: The least value of that reward that counts as right.
    """
    sampled, left_out = comparable(group["answers"])
    judged = [completion["parts"][right_by] for completion in sampled]
    completions = Completions(
        rewards=[completion["reward"] for completion in sampled],
        lengths=[completion["num_tokens"] for completion in sampled],
        right=[score is not None and score >= min_reward for score in judged],
    )
    kept, pairs = keep(completions), pair(completions)
    passed_over = [ok for index, ok in enumerate(completions.right) if index not in kept]
    left_out.update(RIGHT if is_right else WRONG for is_right in passed_over)
    prompt = {name: group[name] for name in ("prompt", *PROMPT_COLUMNS) if name in group}
    return Selection(
        records=[_record(prompt, sampled[index]) for index in kept],
        pairs=[_pair(prompt, sampled[chosen], sampled[other]) for chosen, other in pairs],
        left_out=left_out,
        without_record="" if kept else _why_no_record(len(sampled)),
        without_pair="" if pairs else _why_no_pair(len(sampled)),
    )


def comparable(sampled: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the completions that are fit to learn from, and the number of the others by reason.

    A truncated one would be trained with an end token that it never had; repetitions of one
    completion would count as several.
    """
    left_out: Counter[str] = Counter()
    whole = []
    for completion in sampled:
        reason = _problem(completion)
        if reason:
            left_out[reason] += 1
        else:
            whole.append(completion)
    distinct = first_of_equals([completion["text"] for completion in whole])
    left_out["repeats another completion"] += len(whole) - len(distinct)
    return [whole[index] for index in distinct], left_out


def write_selection(
    run: Path, *, keep: Rule, pair: PairRule, right_by: str, min_reward: float = 1.0
) -> dict[str, Any]:
    """Apply `select`, which explains the arguments, to every prompt in the run folder.

    The report is written last: a run that has one is finished, and is left as it is.

    Returns:
        The content of report.json, which is also logged.
    """
    if (run / REPORT).exists():
        say(f"{run} is finished: nothing is sampled or written.")
        return json.loads((run / REPORT).read_text(encoding="utf-8"))
    total = _Total()
    with whole_files(run / RECORDS, run / PAIRS, run / REPORT) as (*outputs, report_file):
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in outputs]
            for group in read_groups(run / ANSWERS):
                selection = select(
                    group, keep=keep, pair=pair, right_by=right_by, min_reward=min_reward
                )
                total.add(group, selection)
                for file, rows in zip(files, (selection.records, selection.pairs), strict=True):
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        report = total.report()
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        report_file.write_text(text, encoding="utf-8")
    for line in _in_words(report, run):
        say(line)
    return report


def read_groups(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of answers.jsonl, one at a time."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


class _Total:
    """Sums over all prompts."""

    def __init__(self) -> None:
        self.prompts = self.answers = self.records = self.pairs = 0
        self.left_out: Counter[str] = Counter()
        self.without_record: Counter[str] = Counter()
        self.without_pair: Counter[str] = Counter()

    def add(self, group: dict[str, Any], selection: Selection) -> None:
        self.prompts += 1
        self.answers += len(group["answers"])
        self.records += len(selection.records)
        self.pairs += len(selection.pairs)
        self.left_out += selection.left_out
        self.without_record[selection.without_record] += 1
        self.without_pair[selection.without_pair] += 1

    def report(self) -> dict[str, Any]:
        """Return the content of report.json; `answers` is `records` plus everything left out."""
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "left_out": dict(self.left_out.most_common()),
            "records": self.records,
            "prompts_without_record": _counts(self.without_record),
            "pairs": self.pairs,
            "prompts_without_pair": _counts(self.without_pair),
        }


def _problem(completion: dict[str, Any]) -> str:
    if completion["finish_reason"] == "length":
        return "truncated at the longest length"
    if completion["reward"] is None:
        return "without a reward"
    return "" if completion["text"].strip() else "empty"


def _record(prompt: dict[str, Any], completion: dict[str, Any]) -> dict[str, Any]:
    counts = {"reward": completion["reward"], "num_tokens": completion["num_tokens"]}
    return {**prompt, "completion": _content(completion, prompt), **counts}


def _pair(
    prompt: dict[str, Any], chosen: dict[str, Any], rejected: dict[str, Any]
) -> dict[str, Any]:
    both = {"chosen": _content(chosen, prompt), "rejected": _content(rejected, prompt)}
    return {**prompt, **both, "margin": chosen["reward"] - rejected["reward"]}


def _content(completion: dict[str, Any], prompt: dict[str, Any]) -> str | list[dict[str, str]]:
    """Return a text after a text prompt; after messages a message, whose template sets the space
    before it."""
    if isinstance(prompt["prompt"], str):
        return completion["text"]
    return [{"role": "assistant", "content": completion["text"].strip()}]


def _why_no_record(num_comparable: int) -> str:
    if num_comparable:
        return "without a right completion"
    return "without a completion that can be compared"


def _why_no_pair(num_comparable: int) -> str:
    if num_comparable < 2:
        return "with fewer than two completions that can be compared"
    return "without two completions that the rule pairs"


def _counts(reasons: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in reasons.most_common() if reason}


def _in_words(report: dict[str, Any], run: Path) -> Iterator[str]:
    yield f"sampled {report['prompts']:,} prompts, {report['answers']:,} completions"
    yield f"kept    {report['records']:,} completions; left out: {_list(report['left_out'])}"
    for what, name in (("record", RECORDS), ("pair", PAIRS)):
        without = _list(report[f"prompts_without_{what}"])
        number = report[f"{what}s"]
        yield f"{what + 's':8}{number:,} in {run / name}; prompts without one: {without}"


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "none"
