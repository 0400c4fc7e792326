"""Curation of sampled answers by hand: what is kept, what is rewritten, and why the rest is not."""

import json
from pathlib import Path

import pytest

from posttrain.errors import DataError
from posttrain.selection.curate import CAPPED, CODE, LONG, MIXED, WRONG, Readable, curate, rewrite

RULES = Readable("en", ["en", "zh"], max_paragraph_chars=70)
GOOD = "<think>ones 7+5+0=12 tens 4+8+1=13</think><answer>132</answer>"
CHINESE = GOOD.replace("tens", "十")


def answer(text: str, accuracy: float | None = 1.0, finish_reason: str = "stop") -> dict:
    reward = None if accuracy is None else accuracy + 0.2
    return {
        "text": text, "num_tokens": 9, "finish_reason": finish_reason, "reward": reward,
        "parts": {"accuracy": accuracy, "format": 1.0},
    }  # fmt: skip


def curated(folder: Path, *answers: dict, **settings) -> tuple[list[dict], dict]:
    path, records = folder / "answers.jsonl", folder / "records.jsonl"
    path.write_text(json.dumps({"prompt": "q", "answers": answers}) + "\n", encoding="utf-8")
    report = curate(path, records, **{"rules": RULES, "limit": 4, **settings})
    return [json.loads(line) for line in records.read_text().splitlines()], report


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD, ""),
        (CHINESE, MIXED),
        ("<think>7+5=12</think><answer>12</answer>", ""),  # no word, so none is foreign
        (GOOD.replace("</think>", " and so on and on</think>"), LONG),
        (GOOD.replace(" tens", "\ntens").replace("</think>", " and so on</think>"), ""),
        ("<think>ones\n```python\n1\n```</think><answer>1</answer>", CODE),
    ],
)  # fmt: skip
def test_a_text_is_readable_or_has_a_reason(text, problem):
    assert RULES.problem(text) == problem


def test_a_share_of_foreign_words_may_be_allowed():
    assert Readable("en", ["en", "zh"], min_share=0.5).problem(CHINESE) == ""


def test_every_completion_is_kept_or_counted_with_its_reason(tmp_path):
    rows, report = curated(
        tmp_path, answer("<think>ones</think><answer>9</answer>", 0.0), answer(GOOD),
        answer(CHINESE), answer(GOOD), answer(GOOD[:20], 0.0, "length"), answer("?", None),
        answer(GOOD + " " * 9 + "."), answer("<think>sum</think><answer>132</answer>"), limit=1,
    )  # fmt: skip
    assert rows == [{"prompt": "q", "completion": GOOD}]
    assert report["left_out"] == {
        WRONG: 1, MIXED: 1, "repeats another completion": 1, "truncated at the longest length": 1,
        "without a reward": 1, LONG: 1, CAPPED: 1,
    }  # fmt: skip
    assert report["answers"] == report["records"] + sum(report["left_out"].values())


def test_a_rewritten_answer_is_kept_once_and_counted(tmp_path):
    rows, report = curated(tmp_path, answer(CHINESE), answer(GOOD), glossary={"十": "tens"})
    assert [row["completion"] for row in rows] == [GOOD]
    assert (report["rewritten"], report["left_out"]) == (1, {"repeats another completion": 1})


def test_the_longest_word_is_replaced_and_nothing_twice():
    assert rewrite("十二 十", {"十": "二", "十二": "twelve", "": "x"}) == "twelve 二"
    assert rewrite("none", {}) == "none"


def test_data_of_which_nothing_is_kept_is_refused_with_the_reasons(tmp_path):
    with pytest.raises(DataError, match=r"all 2 are left out \(1 wrong, 1 mixed languages\)"):
        curated(tmp_path, answer("a", 0.0), answer(CHINESE))
    assert not (tmp_path / "records.jsonl").exists()
