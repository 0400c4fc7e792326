import random
import subprocess
import sys

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.packed import head as logprobs
from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.packed.head import ScoringHead, chunked_logps, install_scoring_head
from posttrain.packed.prepare import prepare
from tests.conftest import count_chunks, make_model, random_ids


def full(hidden, weight, bias, targets, temperature):
    """Log-probs and entropy from all the logits, by torch alone."""
    log_probs = ((hidden @ weight.T + bias) / temperature).log_softmax(-1)
    logps = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    return logps, -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_give_the_values_and_gradients_of_the_full_computation(monkeypatch, temperature):
    monkeypatch.setattr(logprobs, "CHUNK_ENTRIES", 31 * 5)  # five tokens at a time, the last short
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    inputs = leaf(23, 8), leaf(31, 8), leaf(31)
    targets = torch.randint(31, (23,), generator=draw)
    weights = torch.randn(2, 23, generator=draw, dtype=torch.float64)
    hidden, weight, bias = inputs
    scores = chunked_logps(
        hidden, weight, targets, bias=bias, temperature=temperature, with_entropy=True
    )
    expected = full(*inputs, targets, temperature)
    for found, wanted in zip(scores[:2], expected, strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    found = torch.autograd.grad((weights * torch.stack(scores[:2])).sum(), inputs)
    wanted = torch.autograd.grad((weights * torch.stack(expected)).sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tokens_at_once", [4, 7, 23])
def test_the_kept_chunk_and_the_recomputed_ones_give_the_same_gradients(
    monkeypatch, tokens_at_once
):
    """The first backward has the last chunk's logits at hand, the second computes them all."""
    monkeypatch.setattr(logprobs, "CHUNK_ENTRIES", 31 * tokens_at_once)
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 8, generator=draw).requires_grad_() for n in (23, 31))
    targets = torch.randint(31, (23,), generator=draw)
    logps = chunked_logps(hidden, weight, targets, temperature=0.7).logps
    first = torch.autograd.grad(logps.square().sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logps.square().sum(), (hidden, weight))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("loss", [torch.sum, torch.mean])
def test_gradients_formed_in_the_forward_pass_are_those_of_the_full_computation(monkeypatch, loss):
    monkeypatch.setattr(logprobs, "CHUNK_ENTRIES", 31 * 5)
    draw = torch.Generator().manual_seed(2)
    inputs = [
        torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()
        for shape in ((23, 8), (31, 8), (31,))
    ]
    hidden, weight, bias = inputs
    targets = torch.randint(31, (23,), generator=draw)
    logps = chunked_logps(
        hidden, weight, targets, bias=bias, temperature=0.7, equal_slopes=True
    ).logps
    wanted = torch.autograd.grad(loss(full(*inputs, targets, 0.7)[0]), inputs)
    for retain in (True, False):  # the second backward finds them gone
        found = torch.autograd.grad(loss(logps), inputs, retain_graph=retain)
        for one, other in zip(found, wanted, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "loss", [lambda scores: scores.logps.square().sum(), lambda scores: sum(scores[:2]).sum()]
)
def test_slopes_that_are_not_equal_are_refused(loss):
    """Squares of the log-probs; a sum of log-probs and entropies."""
    hidden, weight = (torch.randn(n, 8).requires_grad_() for n in (20, 31))
    targets = torch.zeros(20, dtype=torch.long)
    scores = chunked_logps(hidden, weight, targets, with_entropy=True, equal_slopes=True)
    with pytest.raises(RuntimeError, match="equal_slopes"):
        loss(scores).backward()


def test_equal_slopes_let_a_loss_that_is_not_finite_through():
    hidden, weight = (torch.randn(n, 8).requires_grad_() for n in (20, 31))
    targets = torch.zeros(20, dtype=torch.long)
    logps = chunked_logps(hidden, weight, targets, equal_slopes=True).logps
    (logps.mean() * float("nan")).backward()
    assert hidden.grad.isnan().all()
    assert weight.grad.isnan().all()


def test_with_equal_slopes_no_chunk_is_computed_twice(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ENTRIES", 31 * 5)
    calls = count_chunks(monkeypatch)
    hidden, weight = (torch.randn(n, 8).requires_grad_() for n in (20, 31))
    targets = torch.zeros(20, dtype=torch.long)
    chunked_logps(hidden, weight, targets, equal_slopes=True).logps.mean().backward()
    assert len(calls) == 4
    chunked_logps(hidden, weight, targets).logps.mean().backward()
    assert len(calls) == 4 + 7  # the last chunk is kept


def test_an_entropy_that_is_only_looked_at_has_no_gradient():
    model = make_model()
    prepare(model)
    batch = pack_groups([[1, 2, 3]], [[[4, 5]]], device="cpu")
    assert packed_logps(model, batch, with_entropy=True).entropy.sum() > 0

    def gradient(**wanted):
        scores = packed_logps(model, batch, with_entropy=True, **wanted)
        found = torch.autograd.grad((scores.logps + scores.entropy).sum(), model.lm_head.weight)
        return found[0]

    (of_logps,) = torch.autograd.grad(packed_logps(model, batch).logps.sum(), model.lm_head.weight)
    torch.testing.assert_close(gradient(entropy_gradient=False), of_logps)
    assert not torch.allclose(gradient(), of_logps)


def test_is_argmax_marks_the_most_likely_token():
    weight = torch.eye(3)
    scores = chunked_logps(
        torch.eye(3), weight, torch.tensor([0, 2, 2]), bias=None, with_entropy=True
    )
    assert scores.is_argmax.tolist() == [1, 0, 1]


def test_the_entropy_of_equal_logits_is_log_v():
    scores = chunked_logps(
        torch.zeros(2, 4), torch.randn(7, 4), torch.tensor([0, 1]), with_entropy=True
    )
    assert torch.allclose(scores.entropy, torch.tensor(7.0).log().expand(2))


def test_the_scoring_head_keeps_tied_weights_tied_and_ordinary_logits_as_they_were():
    model = make_model(tie_word_embeddings=True)
    ids = torch.tensor([random_ids(6, random.Random(0))])
    before = model(ids).logits
    install_scoring_head(model)
    assert isinstance(model.get_output_embeddings(), ScoringHead)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("with_bias", [True, False])
def test_logits_of_a_few_tokens_by_parts_are_those_of_the_whole_layer(monkeypatch, with_bias):
    monkeypatch.setattr(logprobs, "PART", 5)
    head = torch.nn.Linear(8, 31, bias=with_bias)
    few, many = torch.randn(2, 3, 8), torch.randn(logprobs.FEW_TOKENS + 1, 8)
    scoring = ScoringHead.replacing(head)
    torch.testing.assert_close(scoring(few), head(few))
    assert torch.equal(scoring(many), head(many))


def test_temperature_divides_the_logits_of_a_packed_forward():
    model = make_model()
    prepare(model)
    draw = random.Random(1)
    prompt, answer = random_ids(5, draw), random_ids(4, draw)
    scores = packed_logps(model, pack_groups([prompt], [[answer]], device="cpu"), temperature=0.5)
    logits = model(torch.tensor([prompt + answer])).logits[0, 4:-1]
    expected = (logits / 0.5).log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])
    assert torch.allclose(scores.logps, expected.squeeze(-1), atol=1e-5)


def test_logits_that_the_model_changes_afterwards_are_refused():
    with pytest.raises(ConfigError, match="logits_scaling"):
        install_scoring_head(make_model("granite", logits_scaling=8.0))


MEMORY = """
import resource, torch
from posttrain.packed.head import chunked_logps
torch.set_num_threads(2)
hidden = torch.randn(2048, 64, requires_grad=True)
weight = torch.randn(128_000, 64).mul_(0.05).requires_grad_()
targets = torch.randint(128_000, (2048,))
scores = chunked_logps(hidden, weight, targets, with_entropy=True)
scores.logps.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """Full float32 logits would take 1 GB alone, and their gradient as much again."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 1.0  # GiB, torch's own 0.3 included
