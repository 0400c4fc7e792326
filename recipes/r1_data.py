"""Data that the stages of recipes/r1.py make: readable answers, and prompts of two kinds.

write_cold_start(config, answers, "cold_start.jsonl")     # rewritten, then the rules
write_curated(config, answers, "curated.jsonl")           # the rules, and the general data
write_scenarios(problems, general, "scenarios.jsonl")     # with a column kind
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1_rewards import GENERAL, KIND, REASONING

from posttrain.data.formats import DOCUMENTS, PROMPTS, detect_format, parse_row
from posttrain.data.read import read_records
from posttrain.run.folder import whole_file
from posttrain.run.options import say
from posttrain.selection.curate import Readable, curate

if TYPE_CHECKING:
    from r1 import Config

    from posttrain.data.example import Example

NO_ANSWER = "none"  # of a general prompt, whose column no rule reads


def write_cold_start(config: Config, answers: Path, path: str) -> dict[str, Any]:
    """Write readable answers of R1-Zero's model, rewritten by the glossary; return the report."""
    report = curate(
        answers,
        Path(path),
        rules=readable(config),
        limit=config.cold_start_limit,
        glossary=config.glossary,
    )
    _tell(report)
    return report


def write_curated(config: Config, answers: Path, path: str) -> dict[str, Any]:
    """Write what the rules keep of the RL model's answers, and the general data behind it."""
    general = [_record(example) for example in _examples(config.general, DOCUMENTS)]
    with whole_file(path) as partial:
        report = curate(answers, partial, rules=readable(config), limit=config.curated_limit)
        with partial.open("a", encoding="utf-8") as file:
            file.write(_lines(general))
    report["general"] = len(general)
    _tell(report)
    return report


def write_scenarios(problems: str, general: str, share: float, path: str) -> None:
    """Write the prompts of the last RL stage, with the column that says which rewards they have.

    share: of general prompts, all of which are taken; of the problems the first that make it so.
    """
    others = [_prompt(example, GENERAL) for example in _examples(general, PROMPTS)]
    rows = [_prompt(example, REASONING) for example in _examples(problems, PROMPTS)]
    count = min(len(rows), round(len(others) * (1 - share) / share))
    with whole_file(path) as partial:
        partial.write_text(_lines(rows[:count] + others), encoding="utf-8")
    say(
        f"scenarios: {count:,} problems ({len(rows) - count:,} more are left out for a share of "
        f"{share:g}) and {len(others):,} general prompts"
    )


def readable(config: Config) -> Readable:
    """The rules that the settings name."""
    return Readable(config.language, config.among, max_paragraph_chars=config.max_paragraph_chars)


def _examples(source: str, need: str) -> Iterator[Example]:
    records = read_records(source)
    entry = detect_format(records, need)
    for row in records:
        yield from parse_row(entry, row)


def _record(example: Example) -> dict[str, Any]:
    prompt = _text_or_turns(example)
    is_text = isinstance(prompt, str)
    return {
        "prompt": prompt,
        "completion": example.answers[0]["content"] if is_text else [*example.answers],
    }


def _prompt(example: Example, kind: str) -> dict[str, Any]:
    tests = {"tests": example.tests} if example.tests else {}
    answer = NO_ANSWER if example.gold is None or kind == GENERAL else example.gold
    return {"prompt": _text_or_turns(example), "answer": answer, KIND: kind, **tests}


def _text_or_turns(example: Example) -> Any:
    """The text of a single question, else the turns."""
    prompt = example.bare_prompt
    if isinstance(prompt, list) and [turn["role"] for turn in prompt] == ["user"]:
        return prompt[0]["content"]
    return prompt


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _tell(report: dict[str, Any]) -> None:
    left_out = ", ".join(f"{count:,} {why}" for why, count in report["left_out"].items())
    general = f"; general data: {report['general']:,}" if "general" in report else ""
    say(
        f"curated {report['records']:,} of {report['answers']:,} completions, "
        f"{report['rewritten']:,} of them rewritten{general}; left out: {left_out or 'none'}"
    )
