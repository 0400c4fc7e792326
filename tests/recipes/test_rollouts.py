"""--rollout and --overlap_rollouts: who draws, what is said of it, and what cannot be had."""

import json

import common
import pytest
from common import choose_engine
from transformers import AutoTokenizer

from benchmarks.families import tiny_model
from posttrain.errors import ConfigError
from posttrain.losses import icepop_weights, tis_weights
from posttrain.rollouts import vllm
from posttrain.run.options import load
from recipes import grpo, r1_zero
from tests.recipes.conftest import TOKENIZER, run


@pytest.fixture
def gpu(fake_vllm, monkeypatch):
    """A machine with a GPU, for those who ask, and with vLLM."""
    monkeypatch.setattr(common, "_has_gpu", lambda: True)
    return fake_vllm


def choose(capsys, *flags, correction=tis_weights, where_needed=True, recipe=grpo):
    config = load(recipe.Config, flags)
    found = choose_engine(config, correction, where_needed=where_needed)
    return found, capsys.readouterr().out


def test_auto_takes_hf_where_vllm_is_not_installed_and_says_why(capsys):
    found, said = choose(capsys)
    assert found == (None, None)
    assert said == (
        "rollout by hf, the decode loop on the model (no vllm here); importance-sampling "
        "correction: none\n"
    )


def test_auto_takes_hf_where_there_is_no_gpu(fake_vllm, capsys):  # noqa: ARG001
    found, said = choose(capsys)
    assert found.engine is None
    assert "(no GPU here)" in said


def test_auto_takes_vllm_where_it_can_and_corrects_by_tis(gpu, capsys):  # noqa: ARG001
    found, said = choose(capsys, "--vllm_gpu_memory_utilization", "0.4")
    assert found.engine.keywords == {
        "max_model_length": 576,
        "gpu_memory_utilization": 0.4,
        "dtype": "float32",
    }
    assert found.correction is tis_weights
    assert said == (
        "rollout by vllm, on 40% of this GPU's memory, float32; importance-sampling "
        "correction: tis_weights\n"
    )
    found, said = choose(capsys, "--rollout", "hf")
    assert found.engine is found.correction is None


def test_the_correction_may_be_another_one(gpu, capsys):  # noqa: ARG001
    found, said = choose(capsys, correction=icepop_weights)
    assert found.correction is icepop_weights
    assert said.endswith("icepop_weights\n")
    found, _ = choose(capsys, "--rollout", "hf", correction=icepop_weights)
    assert found.correction is None
    found, _ = choose(capsys, "--rollout", "hf", correction=icepop_weights, where_needed=False)
    assert found.correction is icepop_weights


@pytest.mark.parametrize("recipe", [grpo, r1_zero])
def test_answers_of_an_earlier_policy_are_corrected_by_tis(recipe, capsys):
    found, said = choose(capsys, "--overlap_rollouts", recipe=recipe)
    assert found.correction is tis_weights
    assert "one rollout ahead; importance-sampling correction: tis_weights" in said


def test_vllm_that_is_not_installed_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"--rollout: expected .*found no vllm.*posttrain\[vllm"):
        load(grpo.Config, ["--rollout", "vllm"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rollout", "hf", "--vllm_mode", "server"], "--vllm_mode: .* vllm or auto .* found hf"),
        (["--vllm_server_base_url", "http://a"], "url: .*vllm_mode server with it, found colocate"),
        (
            ["--vllm_mode", "server", "--vllm_gpu_memory_utilization", "0.5"],
            "utilization: .*vllm_mode colocate with it, found server",
        ),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        load(grpo.Config, flags)


def test_vllm_without_a_gpu_is_refused(fake_vllm, capsys):  # noqa: ARG001
    with pytest.raises(ConfigError, match="expected a CUDA GPU or a vLLM for CPUs, found none"):
        choose(capsys, "--rollout", "vllm")


def test_vllm_for_cpus_is_taken_where_it_is_asked_for(fake_vllm, monkeypatch, capsys):  # noqa: ARG001
    monkeypatch.setattr(vllm, "version", lambda _name: "0.30.0+cpu")
    found, said = choose(capsys, "--rollout", "vllm")
    assert found.engine.keywords["dtype"] == "float32"
    assert "on 30% of this machine's memory, float32; " in said
    assert found.correction is tis_weights
    assert choose(capsys)[0].engine is None  # auto: the decode loop


def test_a_server_is_looked_for_before_the_model_is_loaded(gpu, capsys):  # noqa: ARG001
    flags = ["--rollout", "vllm", "--vllm_mode", "server", "--vllm_server_base_url"]
    with pytest.raises(ConfigError, match=r"expected a vLLM server at http://127.0.0.1:9, found"):
        choose(capsys, *flags, "http://127.0.0.1:9")


def test_a_recipe_trains_on_answers_by_vllm(gpu, base_run, memorised, tmp_path):  # noqa: ARG001
    row = {"question": memorised[1].question, "answer": memorised[1].answer}
    (tmp_path / "problems.jsonl").write_text((json.dumps(row) + "\n") * 2)
    found = run(
        grpo, tmp_path / "run", model_name_or_path=base_run.model, rollout="vllm", max_steps=2,
        dataset=str(tmp_path / "problems.jsonl"), num_generations=4, learning_rate=1e-3,
        per_device_train_batch_size=4, max_completion_length=40, reward_workers=0,
    )  # fmt: skip
    assert "rollout by vllm" in found.said
    worker = found.trainer.rollouts.current.engine.generation.llm.worker
    assert len(worker.requests) == 2
    assert len(worker.loads) == 2 * len(list(found.trainer.model.parameters()))
    assert max(record["sampler_gap"] for record in found.metrics) < 1e-3
    assert [record["correction"] for record in found.metrics] == pytest.approx([1, 1], abs=1e-3)


def test_auto_takes_hf_where_routing_is_replayed(gpu, capsys):  # noqa: ARG001
    found, said = choose(capsys, "--replay_routing")
    assert found == (None, None)
    assert "rollout by hf" in said


def test_a_recipe_replays_routing_in_float16(memorised, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for saved in (tokenizer, tiny_model("qwen3_moe", vocab_size=len(tokenizer))):
        saved.save_pretrained(tmp_path / "model")
    row = {"question": memorised[1].question, "answer": memorised[1].answer}
    (tmp_path / "problems.jsonl").write_text((json.dumps(row) + "\n") * 2)
    found = run(
        r1_zero, tmp_path / "run", model_name_or_path=str(tmp_path / "model"), max_steps=1,
        dataset=str(tmp_path / "problems.jsonl"), num_generations=4, dtype="float16",
        per_device_train_batch_size=4, max_completion_length=12, reward_workers=0,
        replay_routing=True,
    )  # fmt: skip
    assert "float16 autocast" in found.said
    (record,) = found.metrics
    assert 0 <= record["replayed_choices"] < 0.05
    assert (record["loss_scale"], record["skipped_steps"]) == (65536, 0)
    assert record["sampler_gap"] < 0.01
