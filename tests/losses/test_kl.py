import math

import pytest
import torch

from posttrain.losses import (
    adaptive_kl_coef,
    importance_weighted_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_k3_plus,
    ppo_penalty_coef,
    token_weights,
)
from tests.golden import load

ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3, "k3+": kl_k3_plus}


def token_mean(loss, mask):
    return (loss * token_weights(mask)).sum()


def estimated(case, estimator):
    return token_mean(estimator(case.logp, case.ref, case.mask), case.mask)


GOLDEN = {
    "kl_k1": lambda c: estimated(c, kl_k1),
    "kl_k2": lambda c: estimated(c, kl_k2),
    "kl_k3": lambda c: estimated(c, kl_k3),
    "kl_k3_straight_through_k2": lambda c: estimated(c, kl_k3_plus),
    "kl_k3_importance_weighted": lambda c: token_mean(
        importance_weighted_kl(c.logp, c.old, c.ref, c.mask), c.mask
    ),
}


@pytest.mark.parametrize("case_id", GOLDEN)
def test_golden_value_and_gradient(case_id):
    case = load("kl")[case_id]
    case.check(GOLDEN[case_id](case))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_golden_value_of_each_token(kind):
    case = load("kl")[f"kl_{kind}"]
    case.check_output(ESTIMATORS[kind](case.logp, case.ref, case.mask), "per_token")


def test_golden_adaptive_controller():
    case = load("kl")["adaptive_kl_controller"]
    coef, path = case.init, []
    for kl in case.kl.tolist():
        coef = adaptive_kl_coef(
            coef, kl, target=case.target, horizon=case.horizon, num_episodes=case.n
        )
        path.append(coef)
    case.check_output(torch.tensor(path, dtype=torch.float64), "beta")


def test_golden_penalty_schedule():
    case = load("kl")["ppo_penalty_beta_schedule"]
    coef, path = case.init, []
    for kl in case.kl.tolist():
        coef = ppo_penalty_coef(coef, kl, target=case.target)
        path.append(coef)
    case.check_output(torch.tensor(path, dtype=torch.float64), "beta")


def test_every_golden_case_is_tested():
    controllers = {"adaptive_kl_controller", "ppo_penalty_beta_schedule"}
    assert GOLDEN.keys() | controllers == load("kl").keys()


def test_estimators_by_hand():
    """π = 1/2, π_ref = 1/4: u = log 2, k2 = u²/2, k3 = 1/2 - 1 + log 2."""
    logps, ref, mask = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log(), torch.ones(1, 1)
    assert kl_k1(logps, ref, mask).item() == pytest.approx(math.log(2))
    assert kl_k2(logps, ref, mask).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(logps, ref, mask).item() == pytest.approx(math.log(2) - 0.5)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_equal_policies_have_no_kl_and_no_gradient_but_k1s(kind):
    logps = torch.tensor([[-0.3, -2.0]], requires_grad=True)
    kl = ESTIMATORS[kind](logps, logps.detach(), torch.ones(1, 2))
    kl.sum().backward()
    assert (kl == 0).all()
    assert (logps.grad == (1 if kind == "k1" else 0)).all()


def exact_policies():
    logits, ref_logits = torch.randn(2, 5, dtype=torch.float64)
    logits.requires_grad_()
    return logits, logits.log_softmax(0), ref_logits.log_softmax(0)


def expected_over_policy(logps, values):
    """E_π[value], differentiated through the values alone, as a loss on samples is."""
    return (logps.detach().exp() * values).sum()


@pytest.mark.parametrize("kind", ["k1", "k3", "k3+"])
def test_expected_value_is_the_kl(kind):
    _, logps, ref = exact_policies()
    values = ESTIMATORS[kind](logps.unsqueeze(0), ref.unsqueeze(0), torch.ones(1, 5))[0]
    kl = (logps.exp() * (logps - ref)).sum()
    torch.testing.assert_close(expected_over_policy(logps, values), kl)


@pytest.mark.parametrize(
    ("kind", "divergence"),
    [
        ("k1", lambda logps, _: 0 * logps.sum()),
        ("k2", lambda logps, ref: (logps.exp() * (logps - ref)).sum()),
        ("k3+", lambda logps, ref: (logps.exp() * (logps - ref)).sum()),
        ("k3", lambda logps, ref: (ref.exp() * (ref - logps)).sum()),
    ],
)
def test_expected_gradient_is_that_of_the_divergence_in_the_table(kind, divergence):
    logits, logps, ref = exact_policies()
    values = ESTIMATORS[kind](logps.unsqueeze(0), ref.unsqueeze(0), torch.ones(1, 5))[0]
    loss = expected_over_policy(logps, values)
    found = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(divergence(logps, ref), logits)[0])


def test_k3_keeps_its_digits_where_the_policies_are_close():
    """u = 1e-4 in float32: k3 is u²/2 = 5e-9, which exp(-u) - 1 would lose in rounding."""
    logps, zero = torch.tensor([[1e-4]]), torch.zeros(1, 1)
    assert kl_k3(logps, zero, torch.ones(1, 1)).item() == pytest.approx(5e-9, rel=0.01)


def test_importance_weighted_kl_on_the_policy_itself_is_k3():
    logps, ref, mask = torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 3)
    torch.testing.assert_close(
        importance_weighted_kl(logps, logps, ref, mask), kl_k3(logps, ref, mask)
    )


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_padding_is_zero_and_extremes_are_finite(kind):
    logps = torch.tensor([[-1e4, 0.0, torch.nan]], requires_grad=True)
    ref = torch.tensor([[0.0, -1e4, torch.nan]])
    kl = ESTIMATORS[kind](logps, ref, torch.tensor([[1, 1, 0]]))
    kl.sum().backward()
    assert kl.isfinite().all()
    assert logps.grad.isfinite().all()
    assert kl[0, 2] == 0
    assert logps.grad[0, 2] == 0


def test_adaptive_coefficient_by_hand():
    """An error cut to 20 %, over a tenth of the horizon: 2 % up."""
    coef = adaptive_kl_coef(0.2, 30.0, target=6.0, horizon=10_000, num_episodes=1_000)
    assert coef == pytest.approx(0.204)
