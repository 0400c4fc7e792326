"""From drawn answers to files: SFT records and preference pairs, and what became of the rest.

    report = write_selection(run, keep=best, pair=best_against_worst, right_by="accuracy")

Reads `answers.jsonl` of a run folder (drawing.py), writes `records.jsonl` (prompt, completion),
`pairs.jsonl` (prompt, chosen, rejected, margin) and, last, `report.json`.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.run.console import say
from posttrain.run.files import whole_files
from posttrain.selection.rules import PairRule, Rule, first_of_equals

ANSWERS, RECORDS, PAIRS, REPORT = "answers.jsonl", "records.jsonl", "pairs.jsonl", "report.json"
# Columns of the data that belong to the prompt, and go where it goes.
PROMPT_COLUMNS = ("tools", "chat_template_kwargs")
WRONG, RIGHT = "wrong", "right, but not what the rule keeps"


@dataclass(frozen=True)
class Selection:
    """What is kept of the answers to one prompt; `left_out`: why each of the others is not."""

    records: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    left_out: Counter = field(default_factory=Counter)
    without_record: str = ""  # why there is none
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

    right_by: the part, such as "accuracy", by which an answer is right, from `min_reward` on. A
    pair's margin is the difference of its total rewards.
    """
    answers, left_out = comparable(group["answers"])
    rewards = [answer["reward"] for answer in answers]
    lengths = [answer["num_tokens"] for answer in answers]
    judged = [answer["parts"][right_by] for answer in answers]
    right = [score is not None and score >= min_reward for score in judged]
    kept, pairs = keep(rewards, lengths, right), pair(rewards, lengths, right)
    passed_over = [is_right for place, is_right in enumerate(right) if place not in kept]
    left_out.update(RIGHT if is_right else WRONG for is_right in passed_over)
    prompt = {name: group[name] for name in ("prompt", *PROMPT_COLUMNS) if name in group}
    return Selection(
        records=[_record(prompt, answers[place]) for place in kept],
        pairs=[_pair(prompt, answers[chosen], answers[other]) for chosen, other in pairs],
        left_out=left_out,
        without_record="" if kept else _why_no_record(len(rewards)),
        without_pair="" if pairs else _why_no_pair(len(rewards)),
    )


def comparable(answers: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter]:
    """The answers that somebody could learn from, and how many are not, by reason.

    One that was cut would be trained with an end token that it never had; repetitions of one
    answer would count as several.
    """
    left_out: Counter = Counter()
    whole = []
    for answer in answers:
        reason = _problem(answer)
        if reason:
            left_out[reason] += 1
        else:
            whole.append(answer)
    places = first_of_equals([answer["text"] for answer in whole])
    left_out["repeats another answer"] += len(whole) - len(places)
    return [whole[place] for place in places], left_out


def write_selection(run: Path, **rules: Any) -> dict[str, Any]:
    """`select` for every prompt in the run folder; says and returns what report.json holds.

    rules: the keywords of `select`.
    The report is written last: a run that has one is finished, and is left as it is.
    """
    if (run / REPORT).exists():
        say(f"{run} is finished: nothing is drawn or written.")
        return json.loads((run / REPORT).read_text(encoding="utf-8"))
    total = _Total()
    with whole_files(run / RECORDS, run / PAIRS, run / REPORT) as (*outputs, report_file):
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in outputs]
            for group in read_groups(run / ANSWERS):
                selection = select(group, **rules)
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
    """The lines of answers.jsonl, one at a time."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


class _Total:
    """Sums over all prompts."""

    def __init__(self) -> None:
        self.prompts = self.answers = self.records = self.pairs = 0
        self.left_out: Counter = Counter()
        self.without_record: Counter = Counter()
        self.without_pair: Counter = Counter()

    def add(self, group: dict[str, Any], selection: Selection) -> None:
        self.prompts += 1
        self.answers += len(group["answers"])
        self.records += len(selection.records)
        self.pairs += len(selection.pairs)
        self.left_out += selection.left_out
        self.without_record[selection.without_record] += 1
        self.without_pair[selection.without_pair] += 1

    def report(self) -> dict[str, Any]:
        """`answers` is `records` and all that is left out."""
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "left_out": dict(self.left_out.most_common()),
            "records": self.records,
            "prompts_without_record": _counts(self.without_record),
            "pairs": self.pairs,
            "prompts_without_pair": _counts(self.without_pair),
        }


def _problem(answer: dict[str, Any]) -> str:
    if answer["finish_reason"] == "length":
        return "cut at the longest length"
    if answer["reward"] is None:
        return "without a reward"
    return "" if answer["text"].strip() else "empty"


def _record(prompt: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    completion = _as_answer(answer, prompt)
    counts = {"reward": answer["reward"], "num_tokens": answer["num_tokens"]}
    return {**prompt, "completion": completion, **counts}


def _pair(
    prompt: dict[str, Any], chosen: dict[str, Any], rejected: dict[str, Any]
) -> dict[str, Any]:
    answers = {"chosen": _as_answer(chosen, prompt), "rejected": _as_answer(rejected, prompt)}
    return {**prompt, **answers, "margin": chosen["reward"] - rejected["reward"]}


def _as_answer(answer: dict[str, Any], prompt: dict[str, Any]) -> Any:
    """Text behind a text; behind messages a message, whose template sets the space before it."""
    if isinstance(prompt["prompt"], str):
        return answer["text"]
    return [{"role": "assistant", "content": answer["text"].strip()}]


def _why_no_record(num_answers: int) -> str:
    return "without a right answer" if num_answers else "without an answer that can be compared"


def _why_no_pair(num_answers: int) -> str:
    if num_answers < 2:
        return "with fewer than two answers that can be compared"
    return "without two answers that the rule pairs"


def _counts(reasons: Counter) -> dict[str, int]:
    return {reason: count for reason, count in reasons.most_common() if reason}


def _in_words(report: dict[str, Any], run: Path) -> Iterator[str]:
    yield f"drawn   {report['prompts']:,} prompts, {report['answers']:,} answers"
    yield f"kept    {report['records']:,} answers; left out: {_list(report['left_out'])}"
    for what, name in (("record", RECORDS), ("pair", PAIRS)):
        without = _list(report[f"prompts_without_{what}"])
        number = report[f"{what}s"]
        yield f"{what + 's':8}{number:,} in {run / name}; prompts without one: {without}"


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "none"
