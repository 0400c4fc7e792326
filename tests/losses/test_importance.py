import pytest
import torch

from posttrain.losses import (
    fresh_tokens,
    icepop_weights,
    sequence_mask_weights,
    sequence_tis_weights,
    tis_weights,
)
from tests.golden import load

EVERY = [tis_weights, icepop_weights, sequence_tis_weights, sequence_mask_weights]
every_correction = pytest.mark.parametrize("weights", EVERY, ids=lambda f: f.__name__)


def of_ratios(weights, *ratios, mask=None, **settings):
    """Weights of one answer whose tokens have these π_old / π_rollout."""
    old_logps = torch.tensor([ratios]).log()
    mask = torch.ones_like(old_logps) if mask is None else torch.tensor([mask])
    return weights(old_logps, torch.zeros_like(old_logps), mask, **settings)[0].tolist()


def test_token_weights_by_hand():
    assert of_ratios(tis_weights, 5.0, 1.5, 0.4, cap=2.0) == pytest.approx([2, 1.5, 0.4])
    assert of_ratios(icepop_weights, 5.0, 1.5, 0.4) == pytest.approx([0, 1.5, 0])


def test_answer_weights_by_hand():
    """1.5 · 1.2 = 1.8."""
    assert of_ratios(sequence_tis_weights, 1.5, 1.2) == pytest.approx([1.8, 1.8])
    assert of_ratios(sequence_tis_weights, 1.5, 1.2, cap=1.7) == pytest.approx([1.7, 1.7])
    assert of_ratios(sequence_mask_weights, 1.5, 1.2) == pytest.approx([1.8, 1.8])
    assert of_ratios(sequence_mask_weights, 1.5, 1.2, cap=1.7) == [0, 0]


@every_correction
def test_same_probabilities_on_both_sides_weigh_one(weights):
    assert of_ratios(weights, 1.0, 1.0, 1.0) == [1, 1, 1]


@every_correction
def test_masked_tokens_weigh_zero_and_leave_the_product(weights):
    assert of_ratios(weights, 1.5, 7.0, mask=[1, 0]) == pytest.approx([1.5, 0])


@every_correction
def test_nan_of_the_engine_counts_as_agreement(weights):
    old_logps = torch.tensor([[-1.0, -2.0]])
    found = weights(old_logps, torch.tensor([[-1.0, torch.nan]]), torch.ones(1, 2))
    assert found.tolist() == [[1, 1]]


@every_correction
def test_weights_carry_no_gradient_and_stay_finite(weights):
    old_logps = torch.tensor([[-1e4, 0.0], [0.0, 0.0]], requires_grad=True)
    rollout_logps = torch.tensor([[0.0, 0.0], [-1e4, 0.0]])
    found = weights(old_logps, rollout_logps, torch.ones(2, 2))
    assert not found.requires_grad
    assert found.isfinite().all()


@pytest.mark.parametrize(("max_staleness", "option"), [(0, "option_a"), (2, "option_b")])
def test_fresh_tokens_match_the_golden_case(max_staleness, option):
    """Only the current version trains, or every token does."""
    case = load("rollouts")["partial_rollout_loss_mask"]
    ages = case.current_version - case.version
    found = fresh_tokens(case.mask, ages, max_staleness=max_staleness)
    case.check_output(found, option)


def test_a_bound_between_them_lets_tokens_up_to_that_age_train():
    found = fresh_tokens(torch.ones(1, 3), torch.tensor([[2, 1, 0]]), max_staleness=1)
    assert found.tolist() == [[0, 1, 1]]
