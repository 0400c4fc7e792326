"""Sampled completions become records, pairs and a report that counts each of them once."""

import json
from functools import partial

import pytest

from posttrain.selection.rules import all_correct, best_against_worst
from posttrain.selection.select import select, write_selection

RULES = {"keep": partial(all_correct, limit=1), "pair": best_against_worst, "right_by": "accuracy"}


def completion(
    text: str, reward: float | None, *, finish_reason: str = "stop", num_tokens: int = 5
):
    return {
        "text": text,
        "num_tokens": num_tokens,
        "finish_reason": finish_reason,
        "reward": reward,
        "parts": {"accuracy": reward},
    }


GROUP = {
    "prompt": "1 + 1?",
    "answers": [
        completion("3", 0.25),
        completion("2", None),
        completion("2", 1.0, finish_reason="length"),
        completion("  ", 0.0),
        completion("2", 1.0),
        completion("2 ", 1.0),
        completion("two", 1.25, num_tokens=7),
    ],
}


def test_every_completion_is_either_kept_or_left_out_for_one_reason():
    found = select(GROUP, **RULES)
    record = {"prompt": "1 + 1?", "completion": "2", "reward": 1.0, "num_tokens": 5}
    assert found.records == [record]
    assert dict(found.left_out) == {
        "without a reward": 1, "truncated at the longest length": 1, "empty": 1,
        "repeats another completion": 1, "wrong": 1, "right, but not what the rule keeps": 1,
    }  # fmt: skip


def test_what_is_right_is_said_by_one_reward_and_not_by_the_total():
    """Wrong with a format worth 1, and right with a penalty of a half for its length."""
    wrong, right = completion("3", 1.0), completion("2", 0.5)
    wrong["parts"], right["parts"] = {"accuracy": 0.0}, {"accuracy": 1.0}
    group = {"prompt": "1 + 1?", "answers": [wrong, right]}
    found = select(group, **RULES)
    assert [record["completion"] for record in found.records] == ["2"]
    assert found.left_out["wrong"] == 1


def test_a_pair_holds_the_difference_of_its_rewards():
    (pair,) = select(GROUP, **RULES).pairs
    assert pair == {"prompt": "1 + 1?", "chosen": "two", "rejected": "3", "margin": 1.0}


def test_behind_messages_a_completion_is_a_message_and_tools_go_along():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    completions = [completion(" yes", 1.0), completion("no", 0.0)]
    found = select({"prompt": chat, "tools": tools, "answers": completions}, **RULES)
    yes, no = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
    assert found.records[0]["completion"] == yes
    assert found.pairs == [
        {"prompt": chat, "tools": tools, "chosen": yes, "rejected": no, "margin": 1.0}
    ]


@pytest.fixture
def run(tmp_path):
    groups = [
        GROUP,
        {"prompt": "all wrong", "answers": [completion("a", 0.0), completion("b", 0.25)]},
        {"prompt": "all right", "answers": [completion("a", 1.0), completion("b", 1.0)]},
        {"prompt": "all cut", "answers": [completion("a", 1.0, finish_reason="length")]},
    ]
    lines = [json.dumps(group) + "\n" for group in groups]
    (tmp_path / "answers.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_report_accounts_for_every_prompt_and_completion(run, capsys):
    report = write_selection(run, **RULES)
    assert report == json.loads((run / "report.json").read_text())
    assert (report["prompts"], report["answers"]) == (4, 12)
    assert report["answers"] == report["records"] + sum(report["left_out"].values())
    assert report["records"] == 2
    assert report["prompts_without_record"] == {
        "without a right completion": 1, "without a completion that can be compared": 1,
    }  # fmt: skip
    assert report["pairs"] == 1
    assert report["prompts_without_pair"] == {
        "without two completions that the rule pairs": 2,
        "with fewer than two completions that can be compared": 1,
    }
    for name in ("records", "pairs"):
        assert len((run / f"{name}.jsonl").read_text().splitlines()) == report[name]
    assert (
        f"2 in {run / 'records.jsonl'}; prompts without one: 1 without" in capsys.readouterr().out
    )
    assert not list(run.glob("*.partial"))


def test_a_finished_run_is_left_as_it_is(run, capsys):
    report = write_selection(run, **RULES)
    (run / "records.jsonl").write_text("edited by hand")
    assert write_selection(run, **RULES) == report
    assert (run / "records.jsonl").read_text() == "edited by hand"
    assert "is finished" in capsys.readouterr().out


def test_a_run_that_was_killed_while_it_wrote_writes_again(run):
    (run / "records.jsonl").write_text("from before the kill")
    (run / "pairs.jsonl.partial").write_text("half a")
    write_selection(run, **RULES)
    assert json.loads((run / "records.jsonl").read_text().splitlines()[0])["completion"] == "2"
