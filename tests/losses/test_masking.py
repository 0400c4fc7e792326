import math

import pytest
import torch

from posttrain.losses.masking import exp_bounded, log1mexp


def test_log1mexp_by_hand():
    """1 - 1/2 = 1/2; near 0, 1 - e^-x is x; far from 0 it is 1 - e^-x, so the log is -e^-x."""
    found = log1mexp(torch.tensor([-math.log(2), -1e-5, -17.0]))
    expected = torch.tensor([-math.log(2), math.log(1e-5), -math.exp(-17)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("logp", [0.0, -1e-12, -1e4])
def test_log1mexp_has_a_finite_value_and_gradient_everywhere(logp):
    logps = torch.tensor([logp], requires_grad=True)
    value = log1mexp(logps)
    value.backward()
    assert value.isfinite()
    assert logps.grad.isfinite()


def test_exponent_is_cut_off_at_twenty_nats():
    found = exp_bounded(torch.tensor([-1e4, 0.0, 1e4]))
    torch.testing.assert_close(found, torch.tensor([math.exp(-20), 1.0, math.exp(20)]))
