"""Answers by vLLM: TRL's own VLLMGeneration and client, over a vLLM that computes on the CPU."""

import math
import random

import pytest
import torch
from accelerate import Accelerator

from posttrain.errors import ConfigError, PosttrainError
from posttrain.rollouts import vllm as ours
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.sampling import Sampling
from posttrain.rollouts.vllm import check_server, start_vllm
from posttrain.rollouts.vllm_worker import refresh_heads
from tests.conftest import EOS, make_tokenizer, policy_from, random_ids

STOPS, SEEDS, ANSWERS = tuple(range(2, 12)), (5, 6, 1_000_003), 3
SAMPLINGS = {
    "plain": Sampling(10, STOPS),
    "restricted": Sampling(10, STOPS, 0.8, top_k=20, top_p=0.9, min_tokens=3),
    "strings": Sampling(10, (), 1.3, stop_strings=("4 5", "9 1")),
}


def prompts():
    draw = random.Random(0)
    return [random_ids(length, draw) for length in (3, 17, 8)]


@pytest.fixture(scope="module")
def folder(base):
    return str(base)


@pytest.fixture
def server(fake_vllm, folder):  # noqa: ARG001
    pytest.importorskip("requests")  # TRL's client
    from vllm.fake_server import FakeServer

    server = FakeServer(folder)
    yield server
    server.close()


@pytest.fixture
def start(fake_vllm, monkeypatch, request):  # noqa: ARG001
    """f(model, mode) -> (our generator, the fake's worker)."""

    def start(model, mode, **settings):
        tokenizer, accelerator = make_tokenizer(), Accelerator(cpu=True)
        # "colocate" and "server" are as with a GPU; "cpu" and "folder" do without.
        monkeypatch.setattr(ours, "_on_cuda", lambda _: mode in ("colocate", "server"))
        if mode in ("colocate", "cpu"):
            found = start_vllm(model, accelerator, tokenizer, max_model_length=64, **settings)
            return found, found.generation.llm.worker
        from vllm.fake_server import send_from_any_device

        send_from_any_device(monkeypatch.setattr)
        server = request.getfixturevalue("server")
        found = start_vllm(
            model, accelerator, tokenizer, max_model_length=64, mode="server",
            server_base_url=server.base_url, **settings,
        )  # fmt: skip
        return found, server.worker

    return start


def flat(completions):
    return [completion for siblings in completions for completion in siblings]


@pytest.mark.parametrize("mode", ["colocate", "server", "cpu", "folder"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_completions_are_those_of_our_decode_loop_with_the_same_seeds(name, mode, start, folder):
    """Ids, reasons and log-probs in the sampled distribution, of a policy that vLLM got by sync."""
    model, sampling = policy_from(folder, seed=1), SAMPLINGS[name]
    engine, _ = start(model, mode)
    engine.sync(0)
    found = engine.generate(prompts(), sampling, ANSWERS, seeds=SEEDS)
    own = HFGenerator(model, tokenizer=make_tokenizer())
    expected = own.generate(prompts(), sampling, ANSWERS, seeds=SEEDS)
    assert [len(siblings) for siblings in found] == [ANSWERS] * 3
    assert {completion.finish_reason for completion in flat(found)} == {"stop", "length"}
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        assert one.sampler_logps == pytest.approx(other.sampler_logps, abs=1e-4)
        if sampling.is_restricted:  # vLLM does not say what the whole distribution gave
            assert all(map(math.isnan, one.logps))
        else:
            assert one.logps == one.sampler_logps


def test_greedy_completions_are_those_of_our_decode_loop(start, folder):
    model, sampling = policy_from(folder), Sampling(10, STOPS, temperature=0.0)
    engine, _ = start(model, "colocate")
    found = flat(engine.generate(prompts(), sampling, 1, seeds=SEEDS))
    expected = flat(HFGenerator(model).generate(prompts(), sampling, 1, seeds=SEEDS))
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    assert found[0].logps == pytest.approx(expected[0].logps, abs=1e-4)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_no_two_completions_share_their_random_numbers(mode, start, folder):
    """vLLM gives completion j of a request the seed s + j, and prompts have neighbouring seeds."""
    engine, worker = start(policy_from(folder), mode)
    engine.generate(prompts(), SAMPLINGS["plain"], ANSWERS, seeds=(7, 8, 9))
    seeds = [params.seed + j for params in worker.requests for j in range(params.n)]
    assert len(seeds) == len(set(seeds)) == 3 * ANSWERS


def test_only_our_stop_tokens_end_a_completion_not_those_of_the_models_config(start, folder):
    engine, worker = start(policy_from(folder), "colocate")
    sampling = Sampling(60, (), 2.0)
    completions = flat(engine.generate(prompts()[:1], sampling, ANSWERS, seeds=(0,)))
    assert worker.model.config.eos_token_id == EOS
    assert any(EOS in completion.token_ids[:-1] for completion in completions)
    assert {completion.finish_reason for completion in completions} == {"length"}


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_ids_outside_the_tokenizer_are_never_sampled(mode, start, folder):
    known = 20  # tokens of a tokenizer for which the embedding is too large
    sampling = Sampling(10, STOPS, vocabulary=known)
    engine, _ = start(policy_from(folder), mode)
    tokens = [
        t for c in flat(engine.generate(prompts(), sampling, 8, seeds=SEEDS)) for t in c.token_ids
    ]
    assert max(tokens) < known


def test_a_stop_string_may_hold_special_tokens(fake_vllm, start, folder, monkeypatch):
    """With a policy that says nothing but the end-of-sequence token, whose text is "1"."""

    def only_eos(logits, _params, _masked):
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([EOS]), 0.0)

    monkeypatch.setattr(fake_vllm.Worker, "process", staticmethod(only_eos))
    engine, _ = start(policy_from(folder), "colocate")
    sampling = Sampling(10, (), stop_strings=("1 1",))
    assert flat(engine.generate(prompts()[:1], sampling, 1, seeds=(0,)))[0].token_ids == [EOS, EOS]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_weights_are_brought_over_when_they_have_moved_and_only_then(mode, start, folder):
    model = policy_from(folder)
    engine, worker = start(model, mode)
    names = [name for name, _ in model.named_parameters()]
    for version in (0, 0, 3, 3, 4):
        with torch.no_grad():
            model.get_output_embeddings().weight.fill_(version)
        engine.sync(version)
        assert (worker.model.lm_head.weight == version).all()
    assert worker.loads == names * 3


@pytest.mark.parametrize("mode", ["colocate", "server", "cpu", "folder"])
def test_lora_is_merged_into_what_is_brought_over_and_not_into_the_policy(mode, start, folder):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(policy_from(folder), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    engine, worker = start(model, mode)
    engine.sync(0)
    for name, weight in model.state_dict().items():  # up to the rounding of adding and subtracting
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=0)
    merged = model.merge_and_unload().state_dict()
    for name, weight in worker.model.state_dict().items():
        torch.testing.assert_close(weight, merged[name], atol=1e-6, rtol=0)
    moved = "model.layers.0.mlp.up_proj.weight"
    plain = before[f"base_model.model.{moved}".replace(".weight", ".base_layer.weight")]
    assert (merged[moved] - plain).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_log_prob_that_vllm_does_not_have_is_nan(mode, fake_vllm, start, folder, monkeypatch):
    original = fake_vllm.Logprob

    def broken(logprob, rank):
        return original(math.nan if rank == 1 else logprob, rank)

    monkeypatch.setattr(fake_vllm, "Logprob", broken)
    engine, _ = start(policy_from(folder), mode)
    completions = flat(engine.generate(prompts(), SAMPLINGS["plain"], ANSWERS, seeds=SEEDS))
    unknown = [math.isnan(x) for completion in completions for x in completion.sampler_logps]
    assert 0 < sum(unknown) < len(unknown)
    assert all(
        len(completion.sampler_logps) == len(completion.token_ids) for completion in completions
    )


def test_vllm_is_started_with_what_it_needs_to_know(start, folder):
    engine, _ = start(policy_from(folder), "colocate", gpu_memory_utilization=0.25)
    settings = engine.generation.llm.settings
    assert settings["gpu_memory_utilization"] == 0.25
    assert settings["max_model_len"] == 64
    assert settings["logprobs_mode"] == "processed_logprobs"
    assert settings["tensor_parallel_size"] == 1
    assert settings["dtype"] == "auto"
    engine, _ = start(policy_from(folder), "cpu", dtype="float32")
    assert engine.generation.llm.settings["dtype"] == "float32"
    assert engine.generation.llm.settings["enforce_eager"]


def test_a_rank_without_prompts_samples_nothing(start, folder):
    for mode in ("colocate", "server"):
        engine, worker = start(policy_from(folder), mode)
        assert engine.generate([], SAMPLINGS["plain"], ANSWERS, seeds=[]) == []
        assert worker.requests == []


# Servers that will not do.


def test_a_server_that_is_not_there_is_said_with_how_to_start_one():
    with pytest.raises(ConfigError, match=r"expected a vLLM server at .*found none.*refused") as e:
        check_server("http://127.0.0.1:9")
    assert "vllm serve MODEL --weight-transfer-config" in str(e.value)


def test_a_server_that_is_there_passes(server):
    check_server(server.base_url)


def serve(folder, **settings):
    pytest.importorskip("requests")
    from vllm.fake_server import FakeServer

    server = FakeServer(folder, **settings)
    arguments = {"max_model_length": 64, "mode": "server", "server_base_url": server.base_url}
    try:
        return start_vllm(policy_from(folder), Accelerator(cpu=True), make_tokenizer(), **arguments)
    finally:
        server.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"has_weight_transfer": False}, "no weight-transfer engine"),
        ({"logprobs_mode": "raw_logprobs"}, "expected --logprobs-mode processed_logprobs, found"),
    ],
)
def test_a_server_that_cannot_be_trained_with_is_refused(
    settings, message, fake_vllm, folder, monkeypatch  # noqa: ARG001
):  # fmt: skip
    from vllm.fake_server import send_from_any_device

    send_from_any_device(monkeypatch.setattr)
    monkeypatch.setattr(ours, "_on_cuda", lambda _: True)
    with pytest.raises(ConfigError, match=message):
        serve(folder, **settings)


def test_weights_go_through_a_folder_that_is_gone_afterwards(start, folder, tmp_path):
    model = policy_from(folder, seed=1)
    engine, worker = start(model, "folder", sync_folder=str(tmp_path))
    engine.sync(0)
    assert sorted(worker.loads) == sorted(name for name, _ in model.named_parameters())
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_dies_before_a_sync_is_an_error_that_says_how_to_go_on(start, folder, server):
    engine, _ = start(policy_from(folder), "folder")
    server.close()
    with pytest.raises(PosttrainError, match=r"did not take new weights .*[\s\S]*--resume") as e:
        engine.sync(0)
    assert "--worker-extension-cls posttrain.rollouts.vllm_worker.Reloading" in str(e.value)


class ParallelLMHead(torch.nn.Module):
    """As vLLM packs it on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu_linear, self.packed = None, 0
        self.quant_method = self

    def process_weights_after_loading(self, module) -> None:
        module.packed += 1


def test_a_head_that_was_packed_is_packed_anew():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), ParallelLMHead())
    refresh_heads(model)
    assert model[1].packed == 1


def test_a_request_that_the_server_refuses_ends_the_run_with_its_words(start, folder, server):
    engine, _ = start(policy_from(folder), "server")
    server.max_model_len = 12
    with pytest.raises(
        PosttrainError, match=r"failed to generate a rollout.*maximum context length is 12"
    ):
        engine.generate(prompts(), SAMPLINGS["plain"], ANSWERS, seeds=SEEDS)
