import math

import pytest
import torch

from posttrain.losses import clipped_value_loss, token_weights
from tests.golden import load


def token_mean(case, clip):
    loss = clipped_value_loss(case.values, case.old_values, case.returns, case.mask, clip=clip)
    return (loss * token_weights(case.mask)).sum()


GOLDEN = {
    "ppo_value_clipped": lambda c: token_mean(c, c.clip),
    "ppo_value_unclipped": lambda c: token_mean(c, math.inf),
}


@pytest.mark.parametrize("case_id", GOLDEN)
def test_golden_value_and_gradient(case_id):
    case = load("value")[case_id]
    case.check(GOLDEN[case_id](case))


def test_every_golden_case_is_tested():
    assert GOLDEN.keys() == load("value").keys()


def test_value_past_the_clip_towards_the_return_has_no_gradient():
    """v = 1, v_old = 0, R = 1, clip 0.2: ½ (0.2 - 1)² = 0.32, constant in v."""
    values = torch.tensor([[1.0]], requires_grad=True)
    zeros, ones = torch.zeros(1, 1), torch.ones(1, 1)
    loss = clipped_value_loss(values, zeros, ones, ones, clip=0.2)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.32)
    assert values.grad.item() == 0


def test_value_that_has_not_moved_has_the_gradient_of_the_squared_error():
    values = torch.tensor([[0.3, -1.0]], requires_grad=True)
    returns = torch.tensor([[1.0, 1.0]])
    clipped_value_loss(values, values.detach(), returns, torch.ones(1, 2)).sum().backward()
    torch.testing.assert_close(values.grad, values.detach() - returns)


def test_nan_padding_reaches_neither_value_nor_gradient():
    values = torch.tensor([[1e4, torch.nan]], requires_grad=True)
    padded = torch.tensor([[-1e4, torch.nan]])
    loss = clipped_value_loss(values, padded, padded, torch.tensor([[1, 0]]))
    loss.sum().backward()
    assert loss[0, 1] == 0
    assert loss.isfinite().all()
    assert values.grad.isfinite().all()
