import math

import pytest
import torch

from posttrain.losses import cross_entropy_loss, dft_loss, nll_loss, token_weights
from tests.golden import load


def shifted(case):
    """Logits at t score the token at t + 1; labels of -100 do not train."""
    targets = case.labels[:, 1:]
    return case.logits[:, :-1], targets, (targets != -100).double()


def token_mean(loss, mask):
    return (loss * token_weights(mask, per="token")).sum()


def from_logps(case, loss):
    logits, targets, mask = shifted(case)
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return token_mean(loss(logps, mask), mask)


def from_logits(case, **settings):
    logits, targets, mask = shifted(case)
    return token_mean(cross_entropy_loss(logits, targets, **settings), mask)


GOLDEN = {
    "sft_ce_token_mean": lambda c: from_logps(c, nll_loss),
    "sft_ce_label_smoothing": lambda c: from_logits(c, label_smoothing=c.eps),
    "sft_dft": lambda c: from_logps(c, dft_loss),
}


@pytest.mark.parametrize("case_id", GOLDEN)
def test_golden_value_and_gradient(case_id):
    case = load("supervised")[case_id]
    case.check(GOLDEN[case_id](case))


def test_every_golden_case_is_tested():
    assert GOLDEN.keys() == load("supervised").keys()


def test_cross_entropy_from_logits_is_nll_of_logps():
    case = load("supervised")["sft_ce_token_mean"]
    case.check(from_logits(case))


def test_token_of_probability_one_quarter_costs_log_four():
    logps, mask = torch.tensor([[math.log(0.25)]]), torch.tensor([[True]])
    assert nll_loss(logps, mask).item() == pytest.approx(math.log(4))
    assert dft_loss(logps, mask).item() == pytest.approx(math.log(4) / 4)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_equal_logits_cost_log_vocabulary_whatever_the_smoothing(label_smoothing):
    loss = cross_entropy_loss(
        torch.zeros(1, 2, 8), torch.tensor([[3, 5]]), label_smoothing=label_smoothing
    )
    torch.testing.assert_close(loss, torch.full((1, 2), math.log(8)))


def test_dft_gradient_is_the_probability_times_the_nll_gradient():
    logps = torch.tensor([[-0.1, -1.0, -5.0]], requires_grad=True)
    dft_loss(logps, torch.ones(1, 3)).sum().backward()
    torch.testing.assert_close(logps.grad, -logps.detach().exp())


def test_ignored_label_reaches_neither_value_nor_gradient():
    logits = torch.full((1, 2, 4), torch.nan)
    logits[0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    logits.requires_grad_()
    loss = cross_entropy_loss(logits, torch.tensor([[1, -100]]), label_smoothing=0.1)
    assert loss[0, 1] == 0
    assert loss[0, 0].isfinite()


def test_bfloat16_log_probs_give_a_float32_loss():
    loss = nll_loss(torch.tensor([[-1.0]], dtype=torch.bfloat16), torch.tensor([[True]]))
    assert loss.dtype == torch.float32
