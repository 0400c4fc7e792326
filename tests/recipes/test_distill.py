"""recipes/distill.py, from its settings to a saved model, by each method and teacher."""

import json
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.errors import ConfigError, DataError
from posttrain.run.options import load
from recipes import distill, sft
from tests.recipes.conftest import run
from tests.self_instruct.chat_server import serve

FEW = {"max_steps": 2, "per_device_train_batch_size": 4, "max_completion_length": 12}


@pytest.fixture(scope="module")
def teacher(base_run, first_rows) -> str:
    """The base model, a few steps on."""
    done = run(
        sft, base_run.folder.parent / "teacher", model_name_or_path=base_run.model, max_steps=2,
        dataset=first_rows("sft", 8), per_device_train_batch_size=4,
    )  # fmt: skip
    return done.model


@pytest.fixture(scope="module")
def settings(base_run, teacher, first_rows) -> dict:
    return {
        **FEW, "model_name_or_path": base_run.model, "teacher": teacher,
        "dataset": first_rows("sft", 8),
    }  # fmt: skip


@pytest.mark.parametrize("method", ["gkd", "minillm", "on_policy"])
def test_a_method_trains_and_saves_a_model(method, settings, tmp_path):
    done = run(distill, tmp_path / method, method=method, **settings)
    assert len(done.metrics) == 2
    assert all(0 < record["on_policy"] <= 1 for record in done.metrics)
    assert "the student's tokenizer" in done.said
    trained = AutoModelForCausalLM.from_pretrained(done.model).state_dict()
    start = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"]).state_dict()
    assert not torch.equal(trained["lm_head.weight"], start["lm_head.weight"])
    assert load(distill.Config, ["--config", str(done.folder / "config.yaml")]) == done.config


def test_the_teacher_writes_completions_once_and_the_student_is_trained_on_them(settings, tmp_path):
    """Those that are cut off are counted and left out; the second run asks nothing."""
    more = {**settings, "method": "sft", "max_completion_length": 60}
    log = tmp_path / "run_teacher" / "requests.jsonl"
    first = run(distill, tmp_path / "run", **more)
    answers = [json.loads(line) for line in log.read_text().splitlines()]
    whole = [a for a in answers if a["answer"]["finish_reason"] == "stop"]
    assert len(answers) == 8
    assert f"{len(whole)} completions of 8 prompts; {8 - len(whole)} cut off" in first.said
    assert len(first.trainer.train_dataset) == len(whole) > 0
    assert "### Response:" in answers[0]["request"]["prompt"]
    before = log.read_bytes()
    again = run(distill, tmp_path / "run", **more)
    assert log.read_bytes() == before
    assert [r["loss"] for r in again.metrics] == [r["loss"] for r in first.metrics]


def test_given_completions_are_learnt_as_they_are(settings, tmp_path):
    done = run(distill, tmp_path / "run", **{**settings, "teacher": "given", "method": "sft"})
    assert len(done.trainer.train_dataset) == 8
    assert not (tmp_path / "run_teacher").exists()


def logprob_server(model: str):
    """A server of this model's top tokens at the tokens that it is sent."""
    teacher, lock = AutoModelForCausalLM.from_pretrained(model), threading.Lock()

    def reply(handler):
        body = handler.server.asked[-1]["body"]
        with lock, torch.no_grad():
            ids = torch.tensor([body["prompt"]])
            top = teacher(ids).logits[0, :-1].log_softmax(-1).topk(body["prompt_logprobs"])
        places = [
            {str(i): {"logprob": p} for i, p in zip(ids, logps, strict=True)}
            for ids, logps in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        choice = {"text": "", "prompt_logprobs": [None, *places]}
        handler.send(json.dumps({"choices": [choice]}).encode())

    return serve(default=reply)


def test_a_servers_log_probs_teach_and_are_recorded_for_another_run(settings, tmp_path):
    more = {**settings, "lmbda": 0.0, "per_device_train_batch_size": 1}
    with logprob_server(settings["teacher"]) as server:
        first = run(distill, tmp_path / "first", teacher_url=server.url, top_k=5, **more)
        assert len(server.asked) == 1 + 2
    recorded = tmp_path / "first" / "teacher_logprobs.jsonl"
    more |= {"teacher": "recorded", "dataset": str(recorded), "lmbda": None}
    second = run(distill, tmp_path / "second", **more)
    assert len(second.trainer.train_dataset) == 2
    losses = [[r["loss"] for r in done.metrics] for done in (first, second)]
    assert all(loss > 0 for loss in losses[0] + losses[1])


REFUSED = [
    (["--method", "sft", "--beta", "0.1"], "beta: expected --method gkd with it, found sft."),
    (["--discount", "0.5"], "discount: expected --method on_policy with it, found gkd."),
    (["--teacher", "recorded", "--beta", "1"], "only the forward KL can be computed"),
    (["--teacher", "recorded", "--method", "minillm"], "method: expected gkd or sft"),
    (["--teacher_url", "http://x/v1", "--method", "on_policy"], "method: expected gkd or sft"),
    (["--top_k", "4"], "top_k: expected --teacher_url with it"),
    (["--teacher", "runs/sft/model"], "so there is nothing to learn"),
    (["--teacher", "given"], "teacher: expected --method sft with given, found gkd."),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_settings_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        load(distill.Config, flags)


def test_mistakes_are_found_before_anything_is_trained(settings, tmp_path):
    with pytest.raises(ConfigError, match="--teacher adapter_off: expected --use_peft"):
        run(distill, tmp_path / "a", **{**settings, "teacher": "adapter_off"})
    with pytest.raises(DataError, match="expected a file of recorded log-probs, found none"):
        run(distill, tmp_path / "b", **{**settings, "teacher": "recorded", "dataset": "no/file"})
    with pytest.raises(ConfigError, match="--max_length: expected more than"):
        run(distill, tmp_path / "c", **{**settings, "method": "minillm", "max_length": 12})
    assert not any(Path(tmp_path).glob("*/metrics.jsonl"))
