"""Divergences in chunks: those of the full computation, in values, gradients and not in memory."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.losses import (
    generalised_jsd,
    generalised_jsd_with_slope,
    top_k_kl,
    top_k_kl_with_slope,
)
from posttrain.packed import divergence as module
from posttrain.packed.batch import pack_groups
from posttrain.packed.divergence import (
    States,
    TopK,
    chunked_divergence,
    packed_divergence,
    packed_states,
)
from posttrain.packed.head import Change
from posttrain.packed.prepare import prepare
from tests.conftest import make_model

S, V, D = 23, 31, 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ENTRIES", V * 5)  # five tokens, the last chunk short
    monkeypatch.setattr(module, "BLOCK_ENTRIES", V * 2)


def leaves(seed=0, *, tokens=S, vocabulary=V):
    draw = torch.Generator().manual_seed(seed)
    shapes = (tokens, D), (vocabulary, D), (vocabulary,)
    return [torch.randn(*s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]


def logps_of(inputs, change, temperature):
    hidden, weight, bias = inputs
    return (change.applied(hidden @ weight.T + bias) / temperature).log_softmax(-1)


@pytest.mark.parametrize("change", [Change(), Change(0.7, 3.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0, 0.1, 1])
def test_chunks_give_the_values_and_gradients_of_the_full_computation(beta, temperature, change):
    """With a policy-gradient term, scaled and capped logits, and a teacher of another head."""
    student, teacher = leaves(0), [x.detach() for x in leaves(1)]
    draw = torch.Generator().manual_seed(2)
    targets = torch.randint(V, (S,), generator=draw)
    coefficients = torch.randn(S, generator=draw, dtype=torch.float64)
    hidden, weight, bias = student
    found = chunked_divergence(
        hidden,
        weight,
        targets,
        States(*teacher, change, temperature),
        divergence=partial(generalised_jsd_with_slope, beta=beta),
        bias=bias,
        coefficients=coefficients,
        temperature=temperature,
        change=change,
    )
    logps = logps_of(student, change, temperature)
    values = generalised_jsd(logps, logps_of(teacher, change, temperature), beta=beta)
    of_targets = logps.gather(-1, targets[:, None])[:, 0]
    losses = values - coefficients * of_targets
    for one, other in zip(found, (losses, values, of_targets), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(losses.mean(), student)
    for retain in (True, False):  # the second backward pass finds the formed gradients gone
        got = torch.autograd.grad(found.losses.mean(), student, retain_graph=retain)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_wrong_slope_is_seen():
    """The negative control of the test above: slopes that are off by a thousandth."""

    def off(*inputs):
        values, slope = generalised_jsd_with_slope(*inputs)
        return values, slope * 1.001

    student, teacher = leaves(0), [x.detach() for x in leaves(1)]
    targets, hidden, weight, _ = torch.zeros(S, dtype=torch.long), *student
    found = [
        chunked_divergence(hidden, weight, targets, States(*teacher), divergence=f).losses.sum()
        for f in (off, generalised_jsd_with_slope)
    ]
    one, other = (torch.autograd.grad(x, weight)[0] for x in found)
    assert not torch.allclose(one, other, rtol=0, atol=1e-6)


def test_the_top_k_of_a_server_gives_the_full_computation():
    hidden, weight, _ = student = leaves(0)
    teacher = logps_of([x.detach() for x in leaves(1)], Change(), 1.0)
    top, ids = teacher.topk(4, -1)
    found = chunked_divergence(
        hidden,
        weight,
        torch.zeros(S, dtype=torch.long),
        TopK(ids, top),
        divergence=top_k_kl_with_slope,
    )
    expected = top_k_kl((hidden @ weight.T).log_softmax(-1).gather(-1, ids), top)
    torch.testing.assert_close(found.losses, expected, rtol=0, atol=1e-12)
    got = torch.autograd.grad(found.losses.sum(), student[:2])
    for one, other in zip(got, torch.autograd.grad(expected.sum(), student[:2]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), [(V, V + 3), (V + 3, V)])
def test_padded_vocabularies_are_compared_on_the_tokens_that_both_have(ours, theirs):
    student = leaves(0, vocabulary=ours)
    teacher = [x.detach() for x in leaves(1, vocabulary=theirs)]
    hidden, weight, bias = student
    targets = torch.zeros(S, dtype=torch.long)
    found = chunked_divergence(
        hidden, weight, targets, States(*teacher), divergence=generalised_jsd_with_slope, bias=bias
    )
    logits = hidden @ weight[:V].T + bias[:V]
    other = teacher[0] @ teacher[1][:V].T + teacher[2][:V]
    expected = generalised_jsd(logits.log_softmax(-1), other.log_softmax(-1))
    torch.testing.assert_close(found.values, expected.detach(), rtol=0, atol=1e-12)
    got = torch.autograd.grad(found.losses.sum(), student)
    for one, wanted in zip(got, torch.autograd.grad(expected.sum(), student), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return made


def largest(tokens, compute):
    hidden, weight, bias = leaves(0, tokens=tokens)
    teacher = [x.detach() for x in leaves(1, tokens=tokens)]
    with LargestTensor() as seen:
        compute(hidden, weight, bias, States(*teacher)).sum().backward()
    return seen.entries


def in_chunks(hidden, weight, bias, target):
    targets = torch.zeros(len(hidden), dtype=torch.long)
    settings = {"divergence": generalised_jsd_with_slope, "bias": bias}
    return chunked_divergence(hidden, weight, targets, target, **settings).losses


def in_full(hidden, weight, bias, target):
    teacher = (target.hidden @ target.weight.T + target.bias).log_softmax(-1)
    return generalised_jsd((hidden @ weight.T + bias).log_softmax(-1), teacher)


def test_no_tensor_grows_with_tokens_times_vocabulary():
    """The largest are a chunk of logits, hidden states and weight; in full, all the logits."""
    assert largest(S, in_chunks) == max(5 * V, V * D, S * D)
    assert largest(20 * S, in_chunks) == 20 * S * D
    assert largest(20 * S, in_full) >= 20 * S * V


def test_in_float16_gradients_are_formed_with_the_scale_of_the_loss():
    """About 1e-7 here, most of them would be lost without it."""
    hidden, weight, _ = (x.detach() * 1e-3**i for i, x in enumerate(leaves(0)))
    teacher = [x.detach() * 1e-3**i for i, x in enumerate(leaves(1))][:2]
    settings = {"divergence": generalised_jsd_with_slope}
    targets, found = torch.zeros(S, dtype=torch.long), {}
    for dtype in (torch.float64, torch.float16):
        states = hidden.to(dtype, copy=True).requires_grad_()
        target = States(*(x.to(dtype) for x in teacher))
        losses = chunked_divergence(states, weight.to(dtype), targets, target, **settings).losses
        (losses.sum() * 2.0**14).backward()
        found[dtype] = states.grad.double() / 2.0**14
    assert found[torch.float64].abs().max() < 2.0**-19  # 32 steps of float16
    assert (found[torch.float16] - found[torch.float64]).norm() < 0.02 * found[torch.float64].norm()


def test_losses_of_different_weights_are_refused():
    hidden, weight, bias = leaves(0)
    losses = in_chunks(hidden, weight, bias, States(*(x.detach() for x in leaves(1))))
    with pytest.raises(RuntimeError, match="equal_slopes"):
        (losses * torch.arange(S)).sum().backward()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_two_models_on_one_packed_batch_are_compared_as_two_plain_ones_are(family):
    """Gemma 2 caps its logits after the head, which the chunks do themselves."""
    more = {"query_pre_attn_scalar": 8} if family == "gemma2" else {}
    student, teacher = (make_model(family, seed=seed, **more) for seed in (0, 1))
    prompt, completions = [5, 6, 7], [[8, 9, 1], [10, 1]]
    plain = 0
    for completion in completions:
        ids = torch.tensor([prompt + completion])
        one, other = (m(ids).logits[0, len(prompt) - 1 : -1] for m in (student, teacher))
        plain = (
            plain
            + generalised_jsd(one.log_softmax(-1), other.detach().log_softmax(-1), beta=0.3).sum()
        )
    wanted = torch.autograd.grad(plain, list(student.parameters()))
    for model in (student, teacher):
        prepare(model)
    batch = pack_groups([prompt], [completions], device="cpu")
    target = packed_states(teacher, batch)
    divergence = partial(generalised_jsd_with_slope, beta=0.3)
    found = packed_divergence(student, batch, target, divergence=divergence).losses.sum()
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(found, list(student.parameters()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
