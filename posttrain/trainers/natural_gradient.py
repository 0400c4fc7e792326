"""Compute TRPO's step: as far along the natural gradient as a bound on the KL allows.

    product = fisher_product(logits_of, theta)
    step = natural_step(product, gradient, max_kl=0.01)
    result = line_search(measure, step, max_kl=0.01)

This maximises the surrogate L(θ) = mean r A subject to D(θ) = mean KL(π_old || π_θ) <= max_kl, with
means over trained tokens and the KL over the whole vocabulary, in nats per token. All are pure
functions of flat vectors of P parameters. Nothing here talks to other ranks: the caller sums the
products over them.

Source: TRPO (arXiv 1502.05477), sections 4 to 6 and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # v -> A v, both (P,)


def fisher_product(logits_of: Callable[[Tensor], Tensor], theta: Tensor) -> Product:
    """Return v -> F v, F the Fisher matrix of softmax(logits) in `theta`, a mean over S tokens.

    F = mean_s J_s^T (diag(p_s) - p_s p_s^T) J_s is the Hessian of D at θ_old. Forward mode gives
    u = J v, one backward J^T w with w = p (u - sum p u): the network is never differentiated twice.

    Args:
        logits_of: f((P,) parameters) -> (S, V) logits, differentiable in both modes.
        theta: (P,) parameters θ_old.
    """
    logits, pull_back = torch.func.vjp(logits_of, theta)
    probs = logits.detach().softmax(-1)

    def product(vector: Tensor) -> Tensor:
        _, moved = torch.func.jvp(logits_of, (theta,), (vector,))  # (P,) -> (S, V)
        weighted = probs * (moved - (probs * moved).sum(-1, keepdim=True))
        return pull_back(weighted / len(probs))[0]

    return product


def conjugate_gradient(product: Product, target: Tensor, *, iterations: int = 10) -> Tensor:
    """Solve A x = `target` for a positive definite A, given by `product`.

    Stops when the residual's norm is 1e-10 of the target's. In exact arithmetic, as many iterations
    suffice as A has rows.

    By hand: A = diag(1, 4) and target (1, 4) give (1, 1).
    """
    solution, residual = torch.zeros_like(target), target.clone()
    direction = residual.clone()
    square = residual @ residual
    enough = square * 1e-20  # squares of norms
    for _ in range(iterations):
        if square <= enough:
            break
        pushed = product(direction)
        length = square / (direction @ pushed)
        solution += length * direction
        residual -= length * pushed
        previous, square = square, residual @ residual
        direction = residual + (square / previous) * direction
    return solution


def natural_step(
    product: Product,
    gradient: Tensor,
    *,
    max_kl: float,
    damping: float = 0.1,
    iterations: int = 10,
) -> Tensor:
    """Return sqrt(2 max_kl / x^T (F + damping I) x) x, with (F + damping I) x = gradient of L.

    To second order D is then `max_kl`, less what the damping takes. `damping` >= 0 bounds the step
    in directions that hardly change the policy; a large one turns the step towards the plain
    gradient. A gradient of 0 gives a step of 0.
    By hand: F = I, damping 0, gradient (2, 0), max_kl 0.02 give 0.2/2 (2, 0) = (0.2, 0).
    """

    def damped(vector: Tensor) -> Tensor:
        return product(vector) + damping * vector

    direction = conjugate_gradient(damped, gradient, iterations=iterations)
    curvature = direction @ damped(direction)
    # Rounding can leave 0, a negative number or NaN, of which the step would be NaN.
    if not curvature > 0:
        return torch.zeros_like(gradient)
    return (2 * max_kl / curvature).sqrt() * direction


class LineSearchResult(NamedTuple):
    """The step that a line search accepted, and its effect.

    Attributes:
        step: (P,) accepted step; 0 where no try kept the bound and gained.
        num_shrunk: How often the step was shrunk.
        kl: D at the step, in nats per token.
        gain: Increase of the surrogate L.
    """

    step: Tensor
    num_shrunk: int
    kl: float
    gain: float


def line_search(
    measure: Callable[[Tensor], tuple[float, float]],
    step: Tensor,
    *,
    max_kl: float,
    shrink: float = 0.8,
    max_tries: int = 10,
) -> LineSearchResult:
    """Find the longest of step, shrink step, shrink² step, … with D <= `max_kl` and L not lower.

    Args:
        measure: f(step) -> (gain of L, D) at θ_old + step.
    """
    for tries in range(max_tries):
        tried = shrink**tries * step
        gain, kl = measure(tried)
        if kl <= max_kl and gain >= 0:
            return LineSearchResult(tried, tries, kl, gain)
    return LineSearchResult(torch.zeros_like(step), max_tries, 0.0, 0.0)
