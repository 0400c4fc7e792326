"""Turn sampled completions into readable SFT records, as DeepSeek-R1's two SFT stages did.

    rules = Readable(language="en", among=["en", "zh"], max_paragraph_chars=200)
    report = curate(run / "answers.jsonl", run / "curated.jsonl", rules=rules, limit=2)

    rules.problem("<think>ones 7+5+0=12 十 4+8+1=13</think><answer>132</answer>")   # mixed …
    rewrite("十 4+8+1=13", {"十": "tens"})                                         # tens 4+8+1=13

A completion is kept if it is whole, right, in one language, without code and without an over-long
paragraph; of a prompt's, the first `limit`, since easy prompts have most. Every completion that is
left out is counted with its reason. Source: arXiv 2501.12948, sections 2.3.1 and 2.3.3.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.rewards.language import language_share
from posttrain.run.folder import whole_file
from posttrain.selection.select import comparable, read_groups

WRONG, MIXED, LONG, CODE, CAPPED = (
    "wrong",
    "mixed languages",
    "with an over-long paragraph",
    "with a code block",
    "right, beyond the limit of its prompt",
)


@dataclass(frozen=True)
class Readable:
    """Rules that make a right completion fit to learn from.

    Attributes:
        language, among: See posttrain.rewards.language.language_share.
        min_share: Least share of the reasoning's words in the language.
        max_paragraph_chars: Most characters between two newlines.
    """

    language: str
    among: Sequence[str] | None = None
    min_share: float = 1.0
    max_paragraph_chars: int = 2_000

    def problem(self, text: str) -> str:
        """Say why the text is left out; "" if it is not. A text without words is not mixed."""
        if "```" in text:
            return CODE
        if max(map(len, text.split("\n"))) > self.max_paragraph_chars:
            return LONG
        share = language_share(text, self.language, among=self.among)
        return MIXED if share is not None and share < self.min_share else ""


def rewrite(text: str, glossary: Mapping[str, str]) -> str:
    """Replace each word of the glossary by its translation, the longest first; nothing twice."""
    words = sorted(glossary, key=len, reverse=True)
    place = 0
    pieces = []
    while place < len(text):
        word = next((word for word in words if word and text.startswith(word, place)), "")
        pieces.append(glossary[word] if word else text[place])
        place += len(word) or 1
    return "".join(pieces)


def curate(
    answers: Path,
    records: Path,
    *,
    rules: Readable,
    limit: int,
    glossary: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write records (prompt, completion) of the completions in an answers.jsonl that are kept.

    Args:
        limit: Most records for each prompt.
        glossary: Words to replace before the rules look; none: nothing is rewritten.

    Returns:
        Numbers of `prompts`, `answers`, `records`, `rewritten` records, and `left_out` by reason.

    Raises:
        DataError: Nothing is kept.
    """
    report: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    with whole_file(records) as partial:
        with partial.open("w", encoding="utf-8") as file:
            for group in read_groups(answers):
                report.update(prompts=1, answers=len(group["answers"]))
                for record in _kept(group, rules, limit, glossary or {}, left_out):
                    report.update(records=1, rewritten=record.pop("rewritten"))
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if not report["records"]:
            raise DataError(
                f"{answers}: expected completions to fine-tune on, and all "
                f"{report['answers']:,} are left out ({_counts(left_out)}). Sample more, start "
                "from a better model, or loosen the rules."
            )
    return {**report, "left_out": dict(left_out.most_common())}


def _kept(
    group: dict[str, Any],
    rules: Readable,
    limit: int,
    glossary: Mapping[str, str],
    left_out: Counter[str],
) -> list[dict[str, Any]]:
    """The records of one prompt; counts the rest."""
    whole, reasons = comparable(group["answers"])
    left_out.update(+reasons)
    kept: dict[str, bool] = {}  # text -> whether it was rewritten
    for answer in whole:
        text = rewrite(answer["text"], glossary)
        is_right = answer["parts"]["accuracy"] == 1.0
        reason = rules.problem(text) if is_right else WRONG
        if not reason and text in kept:
            reason = "repeats another completion"
        if not reason and len(kept) == limit:
            reason = CAPPED
        if reason:
            left_out[reason] += 1
        else:
            kept[text] = text != answer["text"]
    return [
        {"prompt": group["prompt"], "completion": text, "rewritten": int(changed)}
        for text, changed in kept.items()
    ]


def _counts(left_out: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
