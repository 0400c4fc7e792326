"""The decode loop on LoRA: completions of the merged model, log-probs of the training forward."""

import pytest
import torch

from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.packed.prepare import prepare
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.sampling import Sampling
from tests.conftest import make_model
from tests.rollouts.greedy import MAX_TOKENS, STOP_IDS, generate_alone, prompts


def adapted(base):
    """With an adapter that says something, and dropout that must not be on while sampling."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2)
    return model.train()


@pytest.fixture(scope="module")
def policy():
    model = make_model()
    prepare(model)
    return adapted(model)


def test_greedy_completions_equal_generates_on_the_merged_model(policy):
    """64 of 64; without the adapter they would be others."""
    expected = generate_alone(adapted(make_model()).merge_and_unload().eval())
    sampling = Sampling(MAX_TOKENS, STOP_IDS, temperature=0.0)
    completions = HFGenerator(policy).generate(prompts(), sampling)
    assert [siblings[0].token_ids for siblings in completions] == expected
    assert policy.training
    with policy.disable_adapter():
        plain = HFGenerator(policy).generate(prompts(), sampling)
    assert sum(a != b for a, b in zip(plain, completions, strict=True)) > 32


def test_log_probs_equal_the_training_forwards(policy):
    texts = prompts(16)
    completions = HFGenerator(policy).generate(texts, Sampling(MAX_TOKENS, STOP_IDS, 0.8), 4)
    ids = [[completion.token_ids for completion in siblings] for siblings in completions]
    batch = pack_groups(texts, ids, device="cpu")
    trained = packed_logps(policy.eval(), batch, temperature=0.8).logps
    sampled = torch.tensor([x for s in completions for completion in s for x in completion.logps])
    assert (trained - sampled).abs().max() < 1e-4
