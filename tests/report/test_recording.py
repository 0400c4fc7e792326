"""What runs record for their reports, and the reports that they make."""

import json
import sys
from functools import partial
from unittest.mock import patch

import pytest

from posttrain.cli import main
from posttrain.rewards.call import Scoring, score
from posttrain.rewards.format import think_answer_format
from posttrain.rewards.math import math_reward
from posttrain.rollouts.record import repeated_share, token_logps
from posttrain.rollouts.sampling import Completion
from posttrain.run.folder import read_log
from posttrain.run.options import load
from recipes import r1_zero
from tests.report.runs import rl_run

RIGHT, WRONG = (
    "<think>1 + 1</think><answer>2</answer>",
    "<think>1 + 1</think><answer>3</answer>",
)


def silent(completions, **_):
    return [0.5] * len(completions)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_reward_tells_the_rule_that_decided_each_completion(num_workers):
    rewards = {"accuracy": (math_reward, 1.0), "format": (think_answer_format, 0.1),
               "silent": (silent, 1.0)}  # fmt: skip
    found = score(
        rewards, [RIGHT, WRONG, "2"], prompts=["1 + 1?"] * 3, completion_ids=[[1]] * 3,
        columns={"answer": ["2"] * 3},
        scoring=Scoring(num_workers=num_workers, timeout_seconds=200),
    )  # fmt: skip
    assert found.parts["accuracy"] == [1.0, 0.0, 0.0]
    assert found.rules["accuracy"][:2] == ["equal text", "different numbers"]
    assert found.rules["accuracy"][2].startswith("no answer: ")
    assert found.rules["format"] == ["think, then answer"] * 2 + ["<think> is missing"]
    assert list(found.rules["silent"]) == [None] * 3


def test_the_rule_of_one_call_is_not_taken_for_that_of_the_next():
    first = partial(score, prompts=["p"], completion_ids=[[1]], columns={"answer": ["2"]})

    here = Scoring(num_workers=0)
    assert first({"a": (math_reward, 1.0)}, [RIGHT], scoring=here).rules["a"] == ["equal text"]
    assert list(first({"a": (silent, 1.0)}, [RIGHT], scoring=here).rules["a"]) == [None]


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def test_tokens_have_their_log_probs_and_those_of_one_character_are_joined():
    ids = list("a€!".encode())
    completion = Completion(ids, [-0.5, -1.0, -2.0, -0.25, 0.0])
    assert token_logps(completion, Bytes()) == [["a", -0.5, 1], ["€", -3.25, 3], ["!", 0.0, 1]]


def test_bytes_that_are_no_character_are_not_waited_for():
    found = token_logps(Completion([0xFF, 0x61], [-1.0, -2.0]), Bytes())
    assert sum(size for _, _, size in found) == 2


def test_of_a_long_completion_the_middle_is_left_out_once():
    completion = Completion([97] * 2000, [-0.5] * 2000)
    found = token_logps(completion, Bytes())
    assert len(found) == 513
    assert found.count(None) == 1
    assert found[256] is None


def test_repetition_by_hand():
    """Of 1 2 1 2 1 2 two of the five pairs are different."""
    assert repeated_share([1, 2, 1, 2, 1, 2], 2) == pytest.approx(3 / 5)
    assert repeated_share([1, 2, 3, 4, 5]) == repeated_share([1]) == 0.0


def run_of(folder, base, **settings):
    problem = {"question": "5 6 7", "answer": "8"}
    data = folder.parent / "problems.jsonl"
    data.write_text((json.dumps(problem) + "\n") * 4)
    config = load(r1_zero.Config, [])
    given = {
        "model_name_or_path": str(base), "output_dir": str(folder), "dataset": str(data),
        "eval_dataset": str(data), "template": "plain", "max_steps": 4, "eval_steps": 3,
        "per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": 8,
        "logging_steps": 1, "reward_workers": 0, "rollout": "hf", **settings,
    }  # fmt: skip
    for name, value in given.items():
        setattr(config, name, value)
    return r1_zero.main(config)


# The program that makes a report, which notes that it was begun.
COUNTED = """
import pathlib, runpy, sys
with (pathlib.Path(sys.argv[1]).parent / "made").open("a") as file:
    file.write(".")
runpy.run_module("posttrain.report", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """A run of four steps that makes its report, and refreshes it at each step."""
    folder = tmp_path_factory.mktemp("made") / "run"
    with patch("posttrain.report.COMMAND", (sys.executable, "-c", COUNTED)):
        run_of(folder, base, report_steps=1)
    return folder


def test_a_run_refreshes_its_report_while_it_trains(done):
    """Once at least before the end: a step waits for no report, and one is made at a time."""
    assert len((done.parent / "made").read_text()) >= 2


def test_a_run_makes_its_report_when_it_ends(done):
    text = (done / "report.html").read_text(encoding="utf-8")
    assert "4 of 4 steps" in text
    assert "finished" in text
    assert not list(done.glob("*.partial"))


def test_the_saved_model_gets_its_card_with_paths_as_the_run_names_them(done):
    text = (done / "model" / "README.md").read_text(encoding="utf-8")
    assert "- data: `" in text
    assert "(SHA-256 `" in text
    assert f"name = '{done}/model'" in text
    assert "## Samples of step 4" in text


def test_a_run_is_evaluated_before_its_first_step_and_after_its_last(done):
    lines = read_log(done / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [0, 3, 4]


def test_log_lines_have_lengths_repetition_and_memory(done):
    for line in read_log(done / "metrics.jsonl"):
        if "loss" not in line:
            continue
        lengths = [line[f"completion_tokens_{name}"] for name in ("p10", "p50", "p90")]
        assert 1 <= lengths[0] <= lengths[1] <= lengths[2] <= 8
        assert 0 <= line["repetition"] <= 1
        assert line["peak_memory_gb"] > 0.01


def test_samples_say_why_they_are_there_and_by_which_rule_they_were_judged(done):
    samples = read_log(done / "samples.jsonl")
    assert {sample["chosen"] for sample in samples} >= {"first", "held out"}
    assert {s["step"] for s in samples if s["chosen"] == "held out"} == {0, 3, 4}
    for sample in samples:
        assert sample["parts"] == ["accuracy", "format"]
        assert set(sample["rules"]) == {"accuracy", "format"}
        assert sum(token[2] for token in sample["token_logps"]) == sample["tokens"]
        assert all(token[1] <= 0 for token in sample["token_logps"])


def test_env_json_has_rows_rewards_and_the_defaults_that_were_changed(done):
    environment = json.loads((done / "env.json").read_text())
    assert environment["rows"] == {"train": 4, "held_out": 4}
    assert environment["rewards"] == {"accuracy": 1.0, "format": 0.2}
    assert environment["defaults"]["max_steps"] == 80
    assert "learning_rate" not in environment["defaults"]


def test_a_report_that_cannot_be_made_is_one_line_and_the_run_is_whole(base, tmp_path, capsys):
    broken = (sys.executable, "-c", "raise SystemExit('no space left')")
    with patch("posttrain.report.COMMAND", broken):
        run_of(tmp_path / "run", base, max_steps=1, eval_steps=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "report.html" in line]
    assert lines == [f"report  no {tmp_path}/run/report.html: no space left"]
    assert (tmp_path / "run" / "model").is_dir()


def test_a_program_that_is_not_there_fails_no_run_either(base, tmp_path, capsys):
    with patch("posttrain.report.COMMAND", (str(tmp_path / "nowhere"),)):
        run_of(tmp_path / "run", base, max_steps=1, eval_steps=0, report_steps=1)
    assert "report  no " in capsys.readouterr().out


def test_the_command_makes_a_report_anew(tmp_path, capsys):
    folder = rl_run(tmp_path / "run", steps=4)
    main(["report", str(folder)])
    assert (folder / "report.html").is_file()
    main(["report", str(folder), "--output", str(tmp_path / "other.html")])
    assert str(tmp_path / "other.html") in capsys.readouterr().out
