"""TRPO's step: the golden tabular problem, exact solutions, and its limits."""

import pytest
import torch

from posttrain.trainers.natural_gradient import (
    conjugate_gradient,
    fisher_product,
    line_search,
    natural_step,
)
from tests.golden import load

TIGHT = {"rtol": 0.0, "atol": 1e-9}


class Tabular:
    """A policy of logits theta[state], as in the golden cases."""

    def __init__(self, case):
        self.case, self.shape = case, case.theta.shape
        self.theta = case.theta.flatten()
        self.rows = torch.arange(len(case.states))

    def logits(self, theta):
        return theta.view(self.shape)[self.case.states]

    def surrogate(self, theta):
        logps, old = (self.logits(t).log_softmax(-1) for t in (theta, self.theta))
        ratio = (logps - old.detach())[self.rows, self.case.actions].exp()
        return (ratio * self.case.advantages).mean()

    def gradient(self):
        theta = self.theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.surrogate(theta), theta)
        return gradient

    def measure(self, step):
        theta = self.theta + step
        old, new = (self.logits(t).log_softmax(-1) for t in (self.theta, theta))
        kl = (old.exp() * (old - new)).sum(-1).mean()
        return (self.surrogate(theta) - self.surrogate(self.theta)).item(), kl.item()

    @property
    def product(self):
        return fisher_product(self.logits, self.theta)


def test_the_golden_step():
    case = load("natural")["trpo_tabular_step"]
    problem = Tabular(case)
    gradient = problem.gradient()
    torch.testing.assert_close(
        gradient.view(problem.shape), case.expected("surrogate_grad"), **TIGHT
    )

    def damped(vector):
        return problem.product(vector) + case.damping * vector

    direction = conjugate_gradient(damped, gradient, iterations=case.cg_iters)
    torch.testing.assert_close(
        direction.view(problem.shape), case.expected("natural_direction"), **TIGHT
    )
    step = natural_step(
        problem.product, gradient, max_kl=case.delta, damping=case.damping,
        iterations=case.cg_iters,
    )  # fmt: skip
    torch.testing.assert_close(step, direction * case.expected("full_step"), **TIGHT)
    found = line_search(problem.measure, step, max_kl=case.delta, shrink=case.backtrack)
    theta_new = (problem.theta + found.step).view(problem.shape)
    torch.testing.assert_close(theta_new, case.expected("theta_new"), **TIGHT)
    assert found.num_shrunk == case.expected("accepted_backtracks")
    assert found.kl == pytest.approx(case.expected("kl").item(), abs=1e-9)
    assert found.gain == pytest.approx(case.expected("surrogate_gain").item(), abs=1e-9)


def test_the_golden_step_that_must_be_shrunk():
    case = load("natural")["trpo_backtracking"]
    problem = Tabular(case)
    step = natural_step(
        problem.product, problem.gradient(), max_kl=case.delta, damping=case.damping, iterations=100
    )
    assert problem.measure(step)[1] == pytest.approx(case.expected("kl_full_step").item(), abs=1e-6)
    found = line_search(problem.measure, step, max_kl=case.delta, shrink=case.backtrack)
    assert found.num_shrunk == case.expected("accepted_backtracks")
    theta_new = (problem.theta + found.step).view(problem.shape)
    torch.testing.assert_close(theta_new, case.expected("theta_new"), rtol=0, atol=1e-6)
    assert found.kl == pytest.approx(case.expected("kl").item(), abs=1e-6)


def test_the_fisher_product_is_the_hessian_of_the_kl():
    """Through a small network: forward and backward once, against autograd's second derivative."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    theta = torch.randn(4 * 6 + 6 * 5, generator=generator, dtype=torch.float64)

    def logits_of(theta):
        return (inputs @ theta[:24].view(4, 6)).tanh() @ theta[24:].view(6, 5)

    def mean_kl(other):
        old, new = (logits_of(t).log_softmax(-1) for t in (theta, other))
        return (old.exp() * (old - new)).sum(-1).mean()

    hessian = torch.autograd.functional.hessian(mean_kl, theta)
    vector = torch.randn(len(theta), generator=generator, dtype=torch.float64)
    product = fisher_product(logits_of, theta)
    torch.testing.assert_close(product(vector), hessian @ vector, rtol=1e-9, atol=1e-12)


def test_conjugate_gradients_solve_in_as_many_iterations_as_there_are_rows():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix, target = root @ root.T + torch.eye(6), torch.arange(6.0).double()
    solution = conjugate_gradient(lambda v: matrix @ v, target, iterations=6)
    torch.testing.assert_close(matrix @ solution, target, rtol=1e-8, atol=1e-8)
    early = conjugate_gradient(lambda v: matrix @ v, target, iterations=3)
    assert (matrix @ early - target).norm() > 1e-3
    exact = conjugate_gradient(lambda v: torch.tensor([1.0, 4.0]) * v, torch.tensor([1.0, 4.0]))
    assert exact.tolist() == pytest.approx([1.0, 1.0])


def test_with_the_identity_for_fisher_the_step_has_the_length_that_the_bound_says():
    step = natural_step(lambda v: v, torch.tensor([2.0, 0.0]), max_kl=0.02, damping=0.0)
    assert step.tolist() == pytest.approx([0.2, 0.0])


def test_without_a_gradient_there_is_no_step():
    step = natural_step(lambda v: v, torch.zeros(3), max_kl=0.01)
    assert step.tolist() == [0.0, 0.0, 0.0]


def test_a_line_search_that_finds_nothing_stands_still():
    step = torch.ones(2)
    for gain, kl in ((-1.0, 0.0), (1.0, 1.0)):
        found = line_search(lambda _, r=(gain, kl): r, step, max_kl=0.5, max_tries=4)
        assert found.step.tolist() == [0.0, 0.0]
        assert (found.num_shrunk, found.kl, found.gain) == (4, 0.0, 0.0)
