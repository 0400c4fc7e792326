"""`posttrain verify`: tell whether an answer is right, and which rule decided.

    posttrain verify --gold 1/2 --answer '\\boxed{0.5}'
    posttrain verify answers.jsonl --allow_last_number

The rows of a file have `gold` and `answer`, or `completion` (a model's text) beside `gold` or, as
in the shipped problems, `answer`. An answer may stand alone, as in `--answer 0.5`. In a completion
the final answer must be marked, as in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from posttrain.errors import ConfigError, DataError
from posttrain.run.options import option, parse

if TYPE_CHECKING:
    from posttrain.rewards.math import Verdict

MARKS = ("\\boxed", "\\fbox", "<answer>", "</answer>", "<think>", "</think>")
COLUMNS = (("gold", "answer"), ("gold", "completion"), ("answer", "completion"))
LONGEST_SHOWN = 60


@dataclass(kw_only=True)
class Config:
    """The flags of `posttrain verify`."""

    gold: str | None = option(None, "the right answer")
    answer: str | None = option(None, "the answer to check: a completion, or a final answer alone")
    file: str | None = option(None, "JSONL file of golds and answers; may be the first argument")
    prefilled_think: bool = option(
        False, "the prompt ended in <think>, so the completion starts in it"
    )
    allow_hashes: bool = option(False, "without a box, take what follows the last ####")
    allow_last_number: bool = option(False, "without a box, take the last number")

    def check(self) -> None:
        """Check that there is a file, or a gold and an answer. ConfigError otherwise."""
        pair = self.gold is not None and self.answer is not None
        if pair == (self.file is not None) or (self.gold is None) != (self.answer is None):
            raise ConfigError("verify: expected a FILE, or --gold and --answer.")


def main(argv: Sequence[str]) -> None:
    """Run the command with these arguments."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--file", *argv]
    config = parse(Config, argv)

    from posttrain.rewards.math import verify_math  # not for --help

    verify = partial(
        verify_math,
        prefilled_think=config.prefilled_think,
        allow_hashes=config.allow_hashes,
        allow_last_number=config.allow_last_number,
    )
    if config.file is not None:
        _verify_file(config.file, verify)
        return
    is_lenient = config.allow_hashes or config.allow_last_number
    verdict = verify(config.gold, config.answer if is_lenient else _marked(config.answer))
    print(f"{_shown(verdict.score)}  {verdict.reason}")


def _verify_file(file: str, verify: Callable[[str, str], Verdict]) -> None:
    """Print the verdict of each row, and how often each verdict occurred."""
    counts: Counter[tuple[str, str]] = Counter()
    for where, gold, text in _rows(file):
        verdict = verify(gold, text)
        counts[_shown(verdict.score), verdict.reason] += 1
        print(f"{where}: {_shown(verdict.score)}  {verdict.reason}  ({_pair(gold, text)})")
    print(f"\n{sum(counts.values()):,} answers")
    for (score, reason), count in counts.most_common():
        print(f"{count:8,}  {score:4}  {reason}")


def _marked(answer: str) -> str:
    """Put a final answer that stands alone into a box; leave a completion as it is."""
    return answer if any(mark in answer for mark in MARKS) else f"\\boxed{{{answer}}}"


def _rows(file: str) -> Iterator[tuple[str, str, str]]:
    """Yield (where, gold, completion) for each row of a file."""
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
