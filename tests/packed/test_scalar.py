"""Scalar heads: packed numbers are those of each sequence alone, and sit on the right token."""

import copy
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from posttrain.errors import ConfigError
from posttrain.packed.batch import pack_pairs
from posttrain.packed.forward import packed_logps
from posttrain.packed.prepare import prepare
from posttrain.packed.scalar import (
    ScalarHead,
    add_critic,
    critic_of,
    last_positions,
    packed_scalars,
    prepare_scalar,
    scores_and_values,
    without_critic,
)
from tests.conftest import make_model, random_ids

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
ANSWERS = ("chosen_ids", "rejected_ids")


def make_classifier(family="llama", *, labels=1, **settings):
    """A sequence classifier with random weights, as transformers makes it."""
    config = make_model(family, **settings).config
    config.num_labels = labels
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(config).eval()


def some_pairs(count=5, *, seed=0):
    draw = random.Random(seed)
    return [
        {name: random_ids(draw.randrange(1, 16), draw) for name in ("prompt_ids", *ANSWERS)}
        for _ in range(count)
    ]


def sequences(pairs):
    return [(pair["prompt_ids"], pair[name]) for pair in pairs for name in ANSWERS]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_scores_are_those_of_transformers_for_each_sequence_alone(family):
    plain = make_classifier(family)
    expected = torch.stack(
        [plain(torch.tensor([p + a])).logits[0, 0] for p, a in sequences(some_pairs())]
    )
    prepare_scalar(plain)
    batch = pack_pairs(some_pairs(), device="cpu")
    positions = last_positions(batch)
    scores = packed_scalars(plain, batch, positions)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    # One token earlier is another number: the comparison can fail.
    assert (packed_scalars(plain, batch, positions - 1) - expected).abs().max() > 1e-2
    again = torch.stack(
        [plain(torch.tensor([p + a])).logits[0, 0] for p, a in sequences(some_pairs())]
    )
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_packed_scores_are_those_of_the_sequences_alone():
    pairs, gradients = some_pairs(), []
    for packed in (False, True):
        model = make_classifier()
        if packed:
            prepare_scalar(model)
            batch = pack_pairs(pairs, device="cpu")
            scores = packed_scalars(model, batch, last_positions(batch))
        else:
            alone = [model(torch.tensor([p + a])).logits[0, 0] for p, a in sequences(pairs)]
            scores = torch.stack(alone)
        scores.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    assert gradients[0].abs().max() > 1


@pytest.mark.parametrize("trunk", ["own", "shared"])
@torch.no_grad()
def test_a_value_is_read_from_the_state_before_its_token(trunk):
    """Token t of an answer: from the hidden state at its predecessor, the prompt's last for t=0."""
    policy, critic = make_model(), make_classifier() if trunk == "own" else None
    prepare(policy)
    add_critic(policy, critic)
    head = critic_of(policy) if critic is None else critic.score
    torch.nn.init.normal_(head.weight)
    trunk_model = policy.model if critic is None else critic.model
    expected = []
    for prompt, answer in sequences(some_pairs()):
        hidden = trunk_model(torch.tensor([prompt + answer]), use_cache=False).last_hidden_state[0]
        expected.append(hidden[len(prompt) - 1 : -1] @ head.weight[0])
    batch = pack_pairs(some_pairs(), device="cpu")
    scores, values = scores_and_values(policy, batch, temperature=0.7)
    torch.testing.assert_close(values, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.logps, packed_logps(policy, batch, temperature=0.7).logps)


@pytest.mark.parametrize("trunk", ["own", "shared"])
@torch.no_grad()
def test_a_new_critic_expects_nothing_and_leaves_the_policy_as_it_was(trunk):
    policy = make_model()
    prepare(policy)
    batch = pack_pairs(some_pairs(), device="cpu")
    before, names = packed_logps(policy, batch).logps, set(policy.state_dict())
    ids = torch.tensor([[5, 6, 7]])
    logits = policy(ids).logits
    add_critic(policy, make_classifier() if trunk == "own" else None)
    scores, values = scores_and_values(policy, batch)
    assert torch.equal(values, torch.zeros_like(values))
    assert torch.equal(scores.logps, before)
    assert torch.equal(policy(ids).logits, logits)
    with without_critic(policy):
        assert set(policy.state_dict()) == names
        assert not hasattr(copy.deepcopy(policy), "critic")
    assert set(policy.state_dict()) > names


def test_scores_are_float32_under_bfloat16_autocast():
    """1 + 2^-10 is not a bfloat16: the head must not round what it adds up."""
    head = ScalarHead(2)
    head.weight.data = torch.tensor([[1.0, 2**-10]])
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.ones(3, 2)).tolist() == [[1 + 2**-10]] * 3
        assert torch.nn.functional.linear(torch.ones(1, 2), head.weight).item() == 1


def test_what_is_no_classifier_with_one_label_is_refused():
    with pytest.raises(ConfigError, match="one label"):
        prepare_scalar(make_classifier(labels=2))
    with pytest.raises(ConfigError, match="no layer called score"):
        prepare_scalar(make_model())
    with pytest.raises(ConfigError, match="no layer called score"):
        add_critic(make_model(), make_model())
