import math

import pytest
import torch

from posttrain.losses import bradley_terry_loss, kwise_loss, step_loss
from tests.golden import load

GOLDEN = {
    "rm_bt": lambda c: bradley_terry_loss(c.chosen, c.rejected).mean(),
    "rm_bt_margin": lambda c: bradley_terry_loss(c.chosen, c.rejected, margin=c.margin).mean(),
    "rm_bt_center": lambda c: bradley_terry_loss(c.chosen, c.rejected, centering=c.eta).mean(),
    "rm_kwise_instructgpt": lambda c: kwise_loss(c.ranked.unsqueeze(0)).mean(),
    "rm_steps": lambda c: step_loss(c.scores, c.right).mean(),
}


@pytest.mark.parametrize("case_id", GOLDEN)
def test_golden_value_and_gradient(case_id):
    case = load("reward_model")[case_id]
    case.check(GOLDEN[case_id](case))


def test_every_golden_case_is_tested():
    assert GOLDEN.keys() == load("reward_model").keys()


def test_margin_and_centering_by_hand():
    """-log σ(2 - 1 - 1) + 0.01 (2 + 1)² = log 2 + 0.09."""
    chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
    loss = bradley_terry_loss(chosen, rejected, margin=1.0, centering=0.01)
    assert loss.item() == pytest.approx(math.log(2) + 0.09)


def test_without_centering_only_the_difference_counts():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    moved = bradley_terry_loss(chosen + 7, rejected + 7)
    torch.testing.assert_close(moved, bradley_terry_loss(chosen, rejected))


def test_two_ranked_answers_are_a_bradley_terry_pair():
    ranked = torch.randn(3, 2)
    torch.testing.assert_close(kwise_loss(ranked), bradley_terry_loss(ranked[:, 0], ranked[:, 1]))


def test_equal_rewards_cost_log_two_for_any_number_of_answers():
    torch.testing.assert_close(kwise_loss(torch.ones(2, 5)), torch.full((2,), math.log(2)))


def test_one_answer_is_refused():
    with pytest.raises(ValueError, match="K >= 2"):
        kwise_loss(torch.ones(3, 1))


def test_extreme_rewards_stay_finite():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([-1e4, 1e4]), centering=0.01)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad.isfinite().all()
