"""Policy losses: what holds for all of them, then each by hand and by its identities."""

import functools
import math

import pytest
import torch

from posttrain.losses import (
    cispo_loss,
    clipped_policy_loss,
    dppo_kl_loss,
    dppo_tv_loss,
    dual_clip_policy_loss,
    gspo_loss,
    gspo_token_loss,
    kimi_policy_loss,
    kimi_squared_loss,
    kimi_token_loss,
    off_policy_mask,
    reinforce_loss,
    rloo_loss,
    token_entropy,
    token_weights,
    two_sided_policy_loss,
)

LOSSES = {
    "reinforce": reinforce_loss,
    "clipped": clipped_policy_loss,
    "dual_clip": dual_clip_policy_loss,
    "two_sided": two_sided_policy_loss,
    "gspo": functools.partial(gspo_loss, clip_low=0.2, clip_high=0.2),
    "gspo_token": functools.partial(gspo_token_loss, clip_low=0.2, clip_high=0.2),
    "rloo": rloo_loss,
    "cispo": cispo_loss,
    "dppo_tv": functools.partial(dppo_tv_loss, tau=0.1),
    "dppo_kl": dppo_kl_loss,
    "kimi": kimi_policy_loss,
    "kimi_squared": kimi_squared_loss,
    "kimi_token": kimi_token_loss,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@pytest.fixture
def batch():
    """Three answers of 4, 2 and 1 tokens, the policy a little away from the sampler."""
    generator = torch.Generator().manual_seed(0)
    logps = -2 * torch.rand(3, 4, generator=generator)
    old_logps = logps + 0.05 * torch.randn(3, 4, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    return logps, old_logps, torch.tensor([1.0, -0.5, 2.0]), mask


def value_and_gradient(loss, logps, *others):
    logps = logps.clone().requires_grad_()
    value = loss(logps, *others)
    return value.detach(), torch.autograd.grad(value.sum(), logps)[0]


@every_loss
def test_nan_padding_reaches_neither_value_nor_gradient(loss, batch):
    logps, old_logps, advantages, mask = batch
    expected = value_and_gradient(loss, logps, old_logps, advantages, mask)
    advantages = advantages.unsqueeze(1).expand(3, 4)
    poisoned = [x.masked_fill(~mask, torch.nan) for x in (logps, old_logps, advantages)]
    found = value_and_gradient(loss, *poisoned, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for tensor in found:
        assert (tensor[~mask] == 0).all()


@every_loss
def test_answer_without_a_trained_token_costs_zero(loss, batch):
    logps, old_logps, advantages, mask = batch
    mask = mask & torch.tensor([[True], [False], [True]])
    for tensor in value_and_gradient(loss, logps, old_logps, advantages, mask):
        assert tensor.isfinite().all()
        assert (tensor[1] == 0).all()


@every_loss
def test_wider_padding_changes_nothing(loss, batch):
    logps, old_logps, advantages, mask = batch
    pad = functools.partial(torch.nn.functional.pad, pad=(0, 2))
    found = loss(pad(logps), pad(old_logps), advantages, pad(mask))
    torch.testing.assert_close(found, pad(loss(*batch)))


@every_loss
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_log_probs_stay_finite(loss, sign):
    logps = torch.tensor([[-1e4, 0.0, -1e4], [0.0, 0.0, -1e4]])
    old_logps = torch.tensor([[0.0, -1e4, -1e4], [-1e4, -1e4, 0.0]])
    found = value_and_gradient(
        loss, logps, old_logps, sign * torch.tensor([1.0, -1.0]), torch.ones(2, 3)
    )
    assert all(tensor.isfinite().all() for tensor in found)


@every_loss
def test_bfloat16_inputs_are_computed_in_float32(loss, batch):
    *floats, mask = batch
    rounded = [x.bfloat16() for x in floats]
    found = loss(*rounded, mask)
    torch.testing.assert_close(found, loss(*(x.float() for x in rounded), mask), rtol=0, atol=0)


@every_loss
def test_advantages_carry_no_gradient(loss, batch):
    logps, old_logps, advantages, mask = batch
    advantages.requires_grad_()
    assert not loss(logps, old_logps, advantages, mask).requires_grad


@every_loss
def test_advantages_per_answer_and_per_token_agree(loss, batch):
    logps, old_logps, advantages, mask = batch
    wide = advantages.unsqueeze(1).expand(3, 4)
    torch.testing.assert_close(loss(logps, old_logps, wide, mask), loss(*batch))


ON_POLICY = [name for name in LOSSES if not name.startswith("kimi_squared")]


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_the_samplers_own_policy_the_gradient_is_reinforces(name, batch):
    """r = 1. Losses of whole answers are spread over their tokens, so compare per sequence: the
    sum over tokens for a product of ratios, the mean for a geometric mean."""
    logps, _, advantages, mask = batch
    weights = token_weights(mask, per="sequence")
    tokens = mask.sum(1, keepdim=True) if name in ("rloo", "kimi") else 1

    def weighted(loss, factor):
        return lambda *inputs: loss(*inputs) * weights * factor

    inputs = (logps, logps.clone(), advantages, mask)
    found = value_and_gradient(weighted(LOSSES[name], 1), *inputs)[1]
    expected = value_and_gradient(weighted(reinforce_loss, tokens), *inputs)[1]
    torch.testing.assert_close(found, expected)


def test_clipped_loss_by_hand():
    """r = 1.5: clipped at 1.2 for A = 1, whole for A = -1; r = 0.5 the other way round."""
    logps = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    inputs = logps, torch.zeros(1, 4), advantages, torch.ones(1, 4)
    loss = clipped_policy_loss(*inputs, clip_low=0.2, clip_high=0.2)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([[-1.2, 1.5, -0.5, 0.8]]))
    torch.testing.assert_close(logps.grad, torch.tensor([[0.0, 1.5, -0.5, 0.0]]))


def test_clip_high_moves_only_the_upper_bound():
    logps, one = torch.tensor([[1.5]]).log(), torch.ones(1, 1)
    loss = clipped_policy_loss(logps, torch.zeros(1, 1), one, one, clip_low=0.2, clip_high=0.28)
    assert loss.item() == pytest.approx(-1.28)


@pytest.mark.parametrize(
    ("loss", "cost"), [(dual_clip_policy_loss, 3.0), (two_sided_policy_loss, 4.0)]
)
def test_bounded_losses_stop_growing_where_the_advantage_is_negative(loss, cost):
    """r = 5, A = -1: the dual clip's 3 |A|, the two-sided clip's cap of 4."""
    logps, one = torch.tensor([[5.0]]).log(), torch.ones(1, 1)
    value, gradient = value_and_gradient(loss, logps, torch.zeros(1, 1), -one, one)
    assert value.item() == pytest.approx(cost)
    assert gradient.item() == 0


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(dual_clip_policy_loss, dual_clip=math.inf),
        functools.partial(two_sided_policy_loss, ratio_cap=math.inf),
    ],
)
def test_bounded_losses_without_their_bound_are_the_clipped_loss(loss, batch):
    logps, old_logps, *others = batch
    inputs = logps, old_logps - 1, *others
    torch.testing.assert_close(loss(*inputs), clipped_policy_loss(*inputs))


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss, rloo_loss])
def test_sequence_loss_of_one_token_answers_is_the_clipped_loss(loss, batch):
    logps, old_logps, advantages, _ = batch
    inputs = logps[:, :1], 5 * old_logps[:, :1], advantages, torch.ones(3, 1)
    settings = {"clip_low": 0.1, "clip_high": 0.1}
    found = value_and_gradient(functools.partial(loss, **settings), *inputs)
    expected = value_and_gradient(functools.partial(clipped_policy_loss, **settings), *inputs)
    torch.testing.assert_close(found, expected)


def test_gspo_ratio_is_the_geometric_mean_and_rloos_the_product():
    """Token ratios of 4 and 1: s = 2, R = 4; A = 1 and no clip."""
    inputs = torch.tensor([[4.0, 1.0]]).log(), torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2)
    wide = {"clip_low": 1.0, "clip_high": math.inf}
    torch.testing.assert_close(gspo_loss(*inputs, **wide), torch.tensor([[-2.0, -2.0]]))
    torch.testing.assert_close(rloo_loss(*inputs, **wide), torch.tensor([[-4.0, -4.0]]))


def test_gspo_token_gives_each_token_its_own_advantage():
    """s = 2, A = (1, 0)."""
    logps, ones = torch.tensor([[4.0, 1.0]]).log(), torch.ones(1, 2)
    advantages = torch.tensor([[1.0, 0.0]])
    loss = functools.partial(gspo_token_loss, clip_low=1.0, clip_high=math.inf)
    value, gradient = value_and_gradient(loss, logps, torch.zeros(1, 2), advantages, ones)
    torch.testing.assert_close(value, torch.tensor([[-2.0, 0.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[-2.0, 0.0]]))


def test_cispo_caps_the_weight_but_keeps_the_gradient():
    """r = 8 counts as 5; π = 1/2, A = 1: 5 log 2, with gradient -5."""
    logps, ones = torch.tensor([[0.5]]).log(), torch.ones(1, 1)
    loss = functools.partial(cispo_loss, ratio_cap=5.0)
    value, gradient = value_and_gradient(loss, logps, logps - math.log(8), ones, ones)
    assert value.item() == pytest.approx(5 * math.log(2))
    assert gradient.item() == -5


def test_dppo_tv_drops_only_moves_along_the_advantage():
    """π_old = 0.5, π = 0.75: 0.25 up is too far for A = 1, free for A = -1 (r = 1.5)."""
    logps, old_logps = torch.tensor([[0.75, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    loss = dppo_tv_loss(logps, old_logps, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
    torch.testing.assert_close(loss, torch.tensor([[0.0, 1.5]]))


def test_dppo_kl_drops_only_moves_along_the_advantage():
    """KL([1/2, 1/2] ‖ [3/4, 1/4]) = 0.144 > 0.05; against the advantage: 1.5 log(3/4)."""
    logps, old_logps = torch.tensor([[0.75, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    advantages, mask = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)
    loss = dppo_kl_loss(logps, old_logps, advantages, mask)
    torch.testing.assert_close(loss, torch.tensor([[0.0, 1.5 * math.log(0.75)]]))
    assert dppo_kl_loss(logps, old_logps, advantages, mask, max_kl=0.15)[0, 0] != 0


def test_off_policy_mask_drops_bad_answers_that_became_unlikely():
    """π_old = 1/2, π = 1/4: log 2 > 0.5; the good answer stays."""
    logps, old_logps = torch.full((2, 2), 0.25).log(), torch.full((2, 2), 0.5).log()
    kept = off_policy_mask(
        logps, old_logps, torch.tensor([-1.0, 1.0]), torch.ones(2, 2), threshold=0.5
    )
    assert kept.tolist() == [[0, 0], [1, 1]]


def test_kimi_loss_by_hand():
    """A = 1, S = -2, S_old = -4, τ = 1: -(-2 - 2) = 4."""
    half = torch.full((1, 2), -1.0)
    loss = kimi_policy_loss(half, 2 * half, torch.ones(1), torch.ones(1, 2), tau=1.0)
    torch.testing.assert_close(loss, torch.tensor([[4.0, 4.0]]))


def test_kimi_squared_gradient_is_two_tau_times_the_surrogates(batch):
    tau = 0.3
    squared = value_and_gradient(functools.partial(kimi_squared_loss, tau=tau), *batch)[1]
    surrogate = value_and_gradient(functools.partial(kimi_policy_loss, tau=tau), *batch)[1]
    torch.testing.assert_close(squared, 2 * tau * surrogate)


def test_entropy_of_equal_logits_is_log_vocabulary_and_of_a_certain_token_zero():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(token_entropy(logits), torch.tensor([math.log(4), 0.0]))
