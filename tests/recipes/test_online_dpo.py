"""Online DPO from settings to a saved model, by rules, a reward model and a judge's file."""

import json
import math
import re

import pytest
from huggingface_hub import constants
from tenacity import wait_none

from posttrain.errors import PosttrainError
from posttrain.report.page import write_report
from posttrain.self_instruct import server as server_module
from recipes import online_dpo, rejection_sampling, reward_model
from tests.recipes.conftest import run
from tests.self_instruct.chat_server import serve, status, text

FEW = {"template": "r1_zero", "max_completion_length": 24, "per_device_train_batch_size": 8}


@pytest.fixture
def judge_file(tmp_path, monkeypatch):
    """Write a judge's file for a server on this machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(server_module, "BACKOFF", wait_none())

    def write(server, **settings) -> str:
        path = tmp_path / "judge.yaml"
        given = {"url": server.url, "model": "m", "max_attempts": 2, "concurrency": 1, **settings}
        path.write_text("".join(f"{name}: {value}\n" for name, value in given.items()))
        return str(path)

    return write


def judging(handler) -> None:
    """The verdict on the request that came in last: the longer answer, or a score by length."""
    prompt = handler.server.asked[-1]["body"]["messages"][0]["content"]
    (mark,) = re.findall(r"lines that begin with (=== \w+)\.", prompt)
    texts = [part.partition("\n") for part in prompt.split(f"\n{mark} ")[1:]]
    sizes = [len(body) for name, _, body in texts if name.startswith("ANSWER")]
    if len(sizes) == 2:
        better = "tie" if sizes[0] == sizes[1] else "AB"[sizes[1] > sizes[0]]
        return text(json.dumps({"reason": "longer", "better": better}))(handler)
    return text(json.dumps({"score": 1 + min(sizes[0], 90) / 10}))(handler)


def test_by_rules_it_ends_in_a_model_and_counts_its_ties(base_run, first_rows, tmp_path):
    done = run(
        online_dpo, tmp_path / "run", model_name_or_path=base_run.model, max_steps=2,
        dataset=first_rows("problems", 16), **{**FEW, "max_completion_length": 40},
    )  # fmt: skip
    assert [record["step"] for record in done.metrics] == [1, 2]
    for record in done.metrics:
        assert record["pairs_unscored"] == 0
        assert 0 <= record["pairs_tied"] <= 1
        assert math.isfinite(record["loss"])
        assert record["sampler_gap"] < 1e-4
    assert (done.folder / "model" / "model.safetensors").is_file()


def test_a_reward_model_scores_any_prompts(base_run, first_rows, tmp_path):
    pairs = first_rows("preferences", 16)
    settings = {"model_name_or_path": base_run.model, "dataset": pairs, "max_steps": 1}
    scorer = run(reward_model, tmp_path / "rm", per_device_train_batch_size=8, **settings)
    done = run(
        online_dpo, tmp_path / "run", reward_model=scorer.model, loss="ipo", use_peft=True,
        **settings, **FEW,
    )  # fmt: skip
    (record,) = done.metrics
    assert record["reward"] == pytest.approx(record["score"] + record["missing_eos"], abs=1e-5)
    assert record["loss"] == pytest.approx(25, abs=1e-3)  # IPO, where the policy is the reference
    assert (done.folder / "model" / "adapter_config.json").is_file()


def test_a_judge_compares_the_completions_of_a_server_s_prompts(
    base_run, first_rows, judge_file, tmp_path
):
    with serve(default=judging) as server:
        done = run(
            online_dpo, tmp_path / "run", model_name_or_path=base_run.model, max_steps=1,
            dataset=first_rows("problems", 8), format_weight=0.0,
            reward=judge_file(server, kind="pairwise", rubric="Longer is better."), **FEW,
        )  # fmt: skip
    asked = [request["body"]["messages"][0]["content"] for request in server.asked]
    (record,) = done.metrics
    assert record["accuracy"] == pytest.approx(0.5)  # of two, one's points are the other's loss
    assert "judge_failed" not in record
    assert "QUESTION\nWhat is" in asked[-1]
    assert "REFERENCE ANSWER\n" in asked[-1]
    assert all("Longer is better." in prompt for prompt in asked)
    kept = (done.folder / "judgements.jsonl").read_text().splitlines()
    assert len(kept) == len(asked) - 1  # all but the first question, before training
    facts = json.loads((done.folder / "env.json").read_text())
    assert "Longer is better." in json.dumps(facts)
    assert record["chosen_tokens"] >= record["rejected_tokens"]
    page = write_report(done.folder).read_text()
    assert "Longer is better." in page
    assert "What is" in page  # a question of the samples


def test_rejection_sampling_keeps_what_a_judge_scores_best(
    base_run, first_rows, judge_file, tmp_path
):
    with serve(default=judging) as server:
        rejection_sampling.main(
            rejection_sampling.Config(
                dataset=first_rows("problems", 3), model_name_or_path=base_run.model,
                template="r1_zero", reward=judge_file(server), format_weight=0.0,
                num_generations=3, max_completion_length=40, output_dir=str(tmp_path / "run"),
            )
        )  # fmt: skip
    lines = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    for answer in (answer for line in lines for answer in json.loads(line)["answers"]):
        assert 0 <= answer["parts"]["accuracy"] <= 1
    assert (tmp_path / "run" / "records.jsonl").is_file()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "judge.yaml: the judge gives no answer .HTTP 503"),
        ({"kind": "scalar", "rivals": 2}, "rivals: expected kind: pairwise"),
        ({"kind": "best"}, "kind"),
        ({"url": "localhost:8000"}, "judge.yaml: url: expected a URL such as"),
    ],
)
def test_a_judge_that_cannot_work_is_one_line_before_anything(settings, said, judge_file, tmp_path):
    with serve(default=status(503)) as server, pytest.raises(PosttrainError, match=said):
        run(
            online_dpo, tmp_path / "run", model_name_or_path="no/such/model",
            reward=judge_file(server, **settings), **FEW,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_judge_s_file_that_is_missing_is_said(tmp_path):
    with pytest.raises(PosttrainError, match="--reward: expected a judge's YAML file, found none"):
        run(online_dpo, tmp_path / "run", reward=str(tmp_path / "none.yaml"))
