"""RLTrainer with vLLM's part played by tests/fakes: the run is that of our own decode loop."""

from functools import partial

import pytest
import torch

from posttrain.advantages import leave_one_out_advantages
from posttrain.errors import ConfigError
from posttrain.losses import tis_weights
from posttrain.rewards.call import Scoring
from posttrain.rollouts.sampling import Sampling
from posttrain.rollouts.vllm import VLLMGenerator, start_vllm
from tests.conftest import EOS, policy_from
from tests.trainers.tiny import MAX_COMPLETION, logged, make_trainer, prompts, weights


@pytest.fixture(scope="module")
def folder(base):
    return str(base)


def model(folder, *, lora=False):
    from peft import LoraConfig, get_peft_model

    found = policy_from(folder)
    if not lora:
        return found
    torch.manual_seed(0)
    return get_peft_model(found, LoraConfig(r=4, target_modules="all-linear"))


def run(folder, output_dir, *, engine=None, lora=False, **settings):
    own = {"correction": tis_weights, "engine": engine, "scoring": Scoring(num_workers=0)}
    own |= settings.pop("trainer", {})
    trainer = make_trainer(
        "rl", output_dir, model=model(folder, lora=lora), trainer=own, **settings
    )
    trainer.train()
    return trainer


vllm = partial(start_vllm, max_model_length=64)


@pytest.mark.parametrize(
    ("overlap", "lora"), [(False, False), (True, True)], ids=["in turn", "overlapped, LoRA"]
)
def test_a_run_with_vllm_ends_where_one_with_our_decode_loop_does(
    overlap, lora, fake_vllm, folder, tmp_path  # noqa: ARG001
):  # fmt: skip
    """The same completions from the same numbers, so the weights of each rollout are the policy's;
    held-out completions in between, by other weights than those of a rollout sampled ahead."""
    settings = {
        "lora": lora, "learning_rate": 3e-2, "eval_strategy": "steps", "eval_steps": 1,
        "trainer": {"overlap": overlap, "eval_prompts": prompts(2, seed=4)},
    }  # fmt: skip
    own = run(folder, tmp_path / "own", **settings)
    other = run(folder, tmp_path / "vllm", engine=vllm, **settings)
    assert isinstance(other.rollouts.current.engine, VLLMGenerator)
    assert (weights(other.model) - weights(own.model)).abs().max() < 1e-4
    assert (weights(own.model) - weights(model(folder, lora=lora))).abs().max() > 1e-2
    for name in ("reward", "eval_reward", "loss", "staleness", "correction", "truncated"):
        assert logged(other, name) == pytest.approx(logged(own, name), abs=1e-4), name
    if not overlap:
        assert max(logged(other, "sampler_gap")) < 1e-4
        assert logged(other, "correction") == pytest.approx([1.0] * 3, abs=1e-4)


def test_weights_that_were_not_brought_over_would_be_seen(
    fake_vllm, folder, tmp_path, monkeypatch  # noqa: ARG001
):  # fmt: skip
    monkeypatch.setattr(VLLMGenerator, "sync", lambda *_: None)
    trainer = run(folder, tmp_path, engine=vllm)
    gaps = logged(trainer, "sampler_gap")
    assert gaps[0] < 1e-4
    assert gaps[1] > 1e-2


def test_weights_are_brought_over_once_a_rollout(fake_vllm, folder, tmp_path):  # noqa: ARG001
    """With them, held-out completions are sampled before the first step and after each."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    held_out = {"eval_prompts": prompts(2, seed=4)}
    trainer = run(folder, tmp_path, engine=vllm, trainer=held_out, **settings)
    worker = trainer.rollouts.current.engine.generation.llm.worker
    num_weights = len(list(trainer.model.parameters()))
    assert len(worker.loads) == 4 * num_weights  # of steps 0, 1, 2, and the last evaluation
    assert len(logged(trainer, "eval_reward")) == 4


def test_a_second_run_does_not_take_the_weights_of_the_first(
    fake_vllm, folder, tmp_path  # noqa: ARG001
):  # fmt: skip
    trainer = run(folder, tmp_path, engine=vllm, max_steps=1)
    trainer.train()  # from step 0 once more, by weights that have moved
    assert logged(trainer, "sampler_gap")[0] < 1e-4


def test_with_top_k_the_gap_is_unknown_and_the_correction_is_not(
    fake_vllm, folder, tmp_path  # noqa: ARG001
):  # fmt: skip
    sampling = Sampling(MAX_COMPLETION, (EOS, 2, 3), top_k=5)
    settings = {"trainer": {"sampling": sampling}, "max_steps": 2}
    own = run(folder, tmp_path / "own", **settings)
    other = run(folder, tmp_path / "vllm", engine=vllm, **settings)
    assert (weights(other.model) - weights(own.model)).abs().max() < 1e-4
    assert logged(other, "correction") == pytest.approx(logged(own, "correction"), abs=1e-4)
    assert logged(own, "correction")[0] < 0.9
    assert max(logged(own, "sampler_gap")) < 1e-4
    assert all(gap != gap for gap in logged(other, "sampler_gap"))  # NaN: nothing to compare


def test_with_top_k_the_kl_in_the_reward_is_that_of_our_decode_loop(
    fake_vllm, folder, tmp_path  # noqa: ARG001
):  # fmt: skip
    """The engine does not know the policy's own log-probs then; the trainer does."""
    own, other = (
        run(
            folder, tmp_path / name, engine=engine, max_steps=2,
            trainer={
                "sampling": Sampling(MAX_COMPLETION, (EOS, 2, 3), top_k=5), "reward_kl_coef": 1.0,
                "advantage": leave_one_out_advantages,
            },
        )
        for name, engine in (("own", None), ("vllm", vllm))
    )  # fmt: skip
    found = logged(other, "kl_per_completion")
    assert found == pytest.approx(logged(own, "kl_per_completion"), abs=1e-4)
    assert abs(found[1]) > 1e-3
    assert (weights(other.model) - weights(own.model)).abs().max() < 1e-4


def test_a_token_without_a_log_prob_trains_with_weight_1_and_is_counted(
    fake_vllm, folder, tmp_path, monkeypatch
):  # fmt: skip
    """vLLM's log-probs are NaN or 0.7 nats too high: rho is 1 or exp(-0.7)."""
    original = fake_vllm.Logprob

    def off(logprob, rank):
        return original(float("nan") if rank == 1 else logprob + 0.7, rank)

    monkeypatch.setattr(fake_vllm, "Logprob", off)
    trainer = run(folder, tmp_path, engine=vllm, max_steps=1)
    (share,), (mean,) = logged(trainer, "unknown_logps"), logged(trainer, "correction")
    assert 0.05 < share < 0.95
    assert mean == pytest.approx(share + (1 - share) * torch.tensor(-0.7).exp().item(), abs=1e-4)
    for name in ("log_rho_p1", "log_rho_p50", "log_rho_p99"):
        assert logged(trainer, name) == pytest.approx([-0.7], abs=1e-4)
    assert logged(trainer, "sampler_gap") == pytest.approx([0.7], abs=1e-4)
    assert logged(trainer, "grad_norm")[0] > 0


def test_without_a_correction_an_engine_is_refused(folder, tmp_path):
    with pytest.raises(
        ConfigError, match="where an engine generates, completions come from another"
    ):
        run(folder, tmp_path, engine=vllm, trainer={"correction": None})
