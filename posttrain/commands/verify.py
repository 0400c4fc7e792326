"""`posttrain verify`: judge answers against golds, and show which rule decided.

    posttrain verify --gold 1/2 --answer '\\boxed{0.5}'
    posttrain verify answers.jsonl --allow_last_number

A file's rows have `gold` and `answer`, or a model's `completion` beside `gold` or `answer` (the
shipped problems call their gold so). An answer may stand alone, as in `--answer 0.5`; in a
completion the final answer must be marked, as in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain.errors import ConfigError, DataError
from posttrain.run.options import option, parse

MARKS = ("\\boxed", "\\fbox", "<answer>", "</answer>", "<think>", "</think>")
COLUMNS = (("gold", "answer"), ("gold", "completion"), ("answer", "completion"))
LONGEST_SHOWN = 60


@dataclass(kw_only=True)
class Config:
    """Settings of one verification."""

    gold: str | None = option(None, "the right answer")
    answer: str | None = option(None, "a completion, or a final answer alone")
    file: str | None = option(None, "JSONL of golds and answers; also as the first argument")
    prefilled_think: bool = option(
        False, "the prompt ended in <think>, so the completion starts inside it"
    )
    allow_hashes: bool = option(False, "without a box, take what follows the last ####")
    allow_last_number: bool = option(False, "without a box, take the last number")

    def check(self) -> None:
        """Raise ConfigError unless there is a file, or a gold with an answer."""
        pair = self.gold is not None and self.answer is not None
        if pair == (self.file is not None) or (self.gold is None) != (self.answer is None):
            raise ConfigError("verify: expected a FILE, or --gold and --answer.")


def main(argv: Sequence[str]) -> None:
    """Print a verdict and its reason for the answer, or for every row of the file."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--file", *argv]
    config = parse(Config, argv)

    from posttrain.rewards.math import verify_math

    options = {
        "prefilled_think": config.prefilled_think,
        "allow_hashes": config.allow_hashes,
        "allow_last_number": config.allow_last_number,
    }
    if config.file is None:
        is_lenient = config.allow_hashes or config.allow_last_number
        text = config.answer if is_lenient else _marked(config.answer)
        verdict = verify_math(config.gold, text, **options)
        print(f"{_shown(verdict.score)}  {verdict.reason}")
        return
    counts: Counter[tuple[str, str]] = Counter()
    for where, gold, text in _rows(config.file):
        verdict = verify_math(gold, text, **options)
        counts[_shown(verdict.score), verdict.reason] += 1
        print(f"{where}: {_shown(verdict.score)}  {verdict.reason}  ({_pair(gold, text)})")
    print(f"\n{sum(counts.values()):,} answers")
    for (score, reason), count in counts.most_common():
        print(f"{count:8,}  {score:4}  {reason}")


def _marked(answer: str) -> str:
    """A final answer that stands alone, boxed; a completion as it is."""
    return answer if any(mark in answer for mark in MARKS) else f"\\boxed{{{answer}}}"


def _rows(file: str) -> Iterator[tuple[str, str, str]]:
    """(where, gold, completion) of each row."""
    from posttrain.data.read import read_records

    for row in read_records(file, split=None):
        columns = next((c for c in COLUMNS if all(name in row.values for name in c)), None)
        if columns is None:
            expected = ", or ".join(" and ".join(pair) for pair in COLUMNS)
            found = ", ".join(row.values) or "nothing"
            raise DataError(f"{row.where}: expected {expected}; found: {found}.")
        gold, text = (row.text_or_number(name) for name in columns)
        yield row.where, gold, _marked(text) if columns[1] == "answer" else text


def _shown(score: float | None) -> str:
    return "None" if score is None else f"{score:g}"


def _pair(gold: str, text: str) -> str:
    shown = [t if len(t) <= LONGEST_SHOWN else "…" + t[-LONGEST_SHOWN:] for t in (gold, text)]
    return "gold {!r}, answer {!r}".format(*shown)
