import random
import subprocess
import sys

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.packed import head as logprobs
from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import install_scoring_head, packed_logps
from posttrain.packed.head import ScoringHead, chunked_logps
from posttrain.packed.prepare import prepare
from tests.conftest import count_chunks, make_model, random_ids
from tests.fakes.device import FakeCuda


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


def rounded_inputs(tokens, vocabulary=500, width=64):
    """bfloat16 hidden states and weight, whose logits have a standard deviation of about 4."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator).to(torch.bfloat16)
    weight = torch.randn(vocabulary, width, generator=generator).mul(0.5).to(torch.bfloat16)
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def in_float64(hidden, weight, targets):
    """Log-probs and entropies of the same rounded numbers, without any more rounding."""
    return full(hidden.double(), weight.double(), torch.zeros(len(weight)).double(), targets, 1.0)


@pytest.mark.parametrize("equal_slopes", [False, True])
@pytest.mark.parametrize("num_chunks", [1, 16, 64])
def test_the_bfloat16_gradient_of_the_weight_has_no_error_that_grows_with_the_chunks(
    monkeypatch, num_chunks, equal_slopes
):
    """Below 0.3 %: the slopes and the result are rounded to bfloat16 once, the sum never is."""
    hidden, weight, targets = rounded_inputs(1024)
    monkeypatch.setattr(logprobs, "CHUNK_ENTRIES", len(weight) * 1024 // num_chunks)
    exact = weight.double().requires_grad_()
    in_float64(hidden, exact, targets)[0].sum().backward()
    weight.requires_grad_()
    calls = count_chunks(monkeypatch)
    chunked_logps(hidden, weight, targets, equal_slopes=equal_slopes).logps.sum().backward()
    assert len(calls) == (num_chunks if equal_slopes else 2 * num_chunks - 1)
    assert weight.grad.dtype == torch.bfloat16
    error = (weight.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 0.003


def test_scores_of_bfloat16_inputs_are_those_of_the_same_numbers_in_float64():
    """Logits rounded to bfloat16 before the softmax would be off by up to 0.06 here."""
    inputs = rounded_inputs(256)
    scores = chunked_logps(*inputs, with_entropy=True)
    for found, wanted in zip(scores[:2], in_float64(*inputs), strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 1e-3
    rounded = (inputs[0] @ inputs[1].T).float().log_softmax(-1)
    gaps = rounded.gather(-1, inputs[2][:, None]).squeeze(-1) - scores.logps
    assert gaps.abs().max() > 1e-2  # the bound is one that bfloat16 logits miss


@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_logits_of_the_decode_loop_are_not_rounded_to_bfloat16(autocast):
    """Under autocast over a float32 layer, and with a layer that is held in bfloat16."""
    hidden, weight, _ = rounded_inputs(7)
    head = torch.nn.Linear(64, 500, bias=False, dtype=torch.bfloat16)
    head.weight.copy_(weight)
    head = ScoringHead.replacing(head.float() if autocast else head)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = head(hidden.float() if autocast else hidden)
    assert logits.dtype == torch.float32
    assert (logits - hidden.double() @ weight.double().T).abs().max() < 1e-4


def test_chunks_are_larger_on_cuda(monkeypatch):
    """There the weight's gradient is read and written once a chunk, and memory is plenty."""
    monkeypatch.setattr(logprobs, "CHUNK_ENTRIES", 31 * 5)
    monkeypatch.setattr(logprobs, "CHUNK_ENTRIES_CUDA", 31 * 10)
    calls = count_chunks(monkeypatch)
    targets = torch.zeros(20, dtype=torch.long)
    with FakeCuda(), torch.no_grad():
        hidden, weight = torch.randn(20, 8).cuda(), torch.randn(31, 8).cuda()
        chunked_logps(hidden, weight, targets.cuda())
    assert len(calls) == 2


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
def test_logits_without_gradient_are_those_of_the_layer(with_bias):
    head = torch.nn.Linear(8, 31, bias=with_bias)
    hidden = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(ScoringHead.replacing(head)(hidden), head(hidden))


def test_temperature_divides_the_logits_of_a_packed_forward():
    model = make_model()
    prepare(model)
    draw = random.Random(1)
    prompt, answer = random_ids(5, draw), random_ids(4, draw)
    scores = packed_logps(model, pack_groups([prompt], [[answer]], device="cpu"), temperature=0.5)
    logits = model(torch.tensor([prompt + answer])).logits[0, 4:-1]
    expected = (logits / 0.5).log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])
    assert torch.allclose(scores.logps, expected.squeeze(-1), atol=1e-5)


@pytest.mark.parametrize("equal_slopes", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(0.25, None), (1.0, 2.0), (3.0, 1.5)])
def test_scaled_and_capped_logits_have_the_scores_and_slopes_of_autograd(scale, cap, equal_slopes):
    """By the full logits, in float64; the temperature comes last."""
    draw = torch.Generator().manual_seed(3)
    given = [
        torch.randn(*size, dtype=torch.float64, generator=draw).requires_grad_()
        for size in ((7, 5), (11, 5), (11,))
    ]
    hidden, weight, bias = given
    targets = torch.tensor([0, 3, 10, 4, 4, 9, 1])
    logits = (hidden @ weight.T + bias) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    log_probs = (logits / 0.7).log_softmax(-1)
    wanted = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    found = chunked_logps(hidden, weight, targets, bias=bias, temperature=0.7, with_entropy=True,
                          equal_slopes=equal_slopes, scale=scale, cap=cap)  # fmt: skip
    torch.testing.assert_close(found.logps, wanted)
    torch.testing.assert_close(found.entropy, entropy)
    loss = [s.logps.sum() if equal_slopes else s.logps @ targets.double() + s.entropy.sum() * 0.3
            for s in (found, found._replace(logps=wanted, entropy=entropy))]  # fmt: skip
    slopes = [torch.autograd.grad(value, given) for value in loss]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
    ],
)
def test_what_a_model_does_to_its_logits_the_head_does_to_scored_ones_and_the_model_to_others(
    family, settings
):
    model = make_model(family, **settings)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    prepare(model)
    scores = packed_logps(model, pack_groups([[5, 6]], [[[7, 8]]], device="cpu"))
    wanted = before[0, 1:3].log_softmax(-1)[[0, 1], [7, 8]]
    torch.testing.assert_close(scores.logps, wanted)
    assert {name: getattr(model.config, name) for name in settings} == settings
    torch.testing.assert_close(model(ids).logits, before)


def test_a_change_of_logits_that_is_not_the_known_one_is_refused():
    model = make_model("granite", logits_scaling=8.0)
    plain = type(model).forward
    model.__class__ = type("Other", (type(model),), {
        "forward": lambda self, *arguments, **inputs: _squared(plain(self, *arguments, **inputs))
    })  # fmt: skip
    with pytest.raises(ConfigError, match="changes its logits"):
        install_scoring_head(model)


def _squared(output):
    output.logits = output.logits**2
    return output


MEMORY = """
import re, torch
from posttrain.packed.head import chunked_logps
torch.set_num_threads(2)
hidden = torch.randn(2048, 64, requires_grad=True)
weight = torch.randn(128_000, 64).mul_(0.05).requires_grad_()
targets = torch.randint(128_000, (2048,))
scores = chunked_logps(hidden, weight, targets, with_entropy=True)
scores.logps.sum().backward()
# Not ru_maxrss, which begins with the memory of the process that started this one.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**20)
"""


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """Full float32 logits would take 1 GB alone, and their gradient as much again."""
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0  # GiB, torch's own 0.3 included
