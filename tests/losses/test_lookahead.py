import math

import pytest
import torch

from posttrain.losses import (
    ahead_logps,
    medusa1_loss,
    medusa2_loss,
    mtp_loss,
    parallel_heads_loss,
    self_distillation_kl,
)
from tests.golden import load

HALF = torch.full((3,), 0.5).log()


def medusa_heads(case):
    return [ahead_logps(head, case.labels, offset=k + 2) for k, head in enumerate(case.heads)]


def modules(case):
    """The last of the T + 1 tokens is a target alone, so its logits are made up."""
    zeros = torch.zeros_like(case.mods[:, :1])
    logits = torch.cat((case.mods, zeros), 1)
    return [ahead_logps(x[None], case.tokens[None], offset=k + 2) for k, x in enumerate(logits)]


def distillation(case, *, per_valid: bool):
    valid = case.labels[:, 1:] != -100
    kl = self_distillation_kl(case.base[:, :-1], case.teacher[:, :-1], valid)
    return kl.sum() / (valid.sum() if per_valid else valid.numel())


GOLDEN = {
    "medusa1_loss": lambda c: medusa1_loss(medusa_heads(c), decay=c.decay),
    "medusa2_loss": lambda c: medusa2_loss(
        ahead_logps(c.base, c.labels, offset=1),
        medusa_heads(c),
        lambda0=c.lambda0,
        decay=c.decay,
    ),
    "medusa2_self_distill_kl_valid": lambda c: distillation(c, per_valid=True),
    "medusa2_self_distill_kl_all": lambda c: distillation(c, per_valid=False),
    "mtp_gloeckle_sum": lambda c: parallel_heads_loss(
        [ahead_logps(head, c.tokens, offset=i + 1) for i, head in enumerate(c.heads)]
    ),
    "mtp_deepseek_v3_div_T": lambda c: mtp_loss(
        modules(c), weight=c.lam, totals=[c.mods.shape[1]] * c.D
    ),
    "mtp_deepseek_v3_div_valid": lambda c: mtp_loss(modules(c), weight=c.lam),
}


@pytest.mark.parametrize("case_id", GOLDEN)
def test_golden_value_and_gradient(case_id):
    case = load("lookahead")[case_id]
    case.check(GOLDEN[case_id](case))


def test_each_head_has_the_golden_mean():
    case = load("lookahead")["medusa1_loss"]
    found = torch.stack([-of_head.mean() for of_head in medusa_heads(case)])
    case.check_output(found, "per_head")


def test_every_golden_case_is_tested():
    assert GOLDEN.keys() == load("lookahead").keys()


def test_the_values_by_hand():
    assert medusa1_loss([HALF, HALF]).item() == pytest.approx(1.44 * math.log(2))
    assert medusa2_loss(HALF, [HALF, HALF]).item() == pytest.approx(1.288 * math.log(2))
    assert mtp_loss([HALF, HALF]).item() == pytest.approx(0.3 * math.log(2))
    assert parallel_heads_loss([HALF, HALF]).item() == pytest.approx(2 * math.log(2))
    teacher, current = (torch.tensor([[[p, 1 - p]]]).log() for p in (0.5, 0.25))
    kl = self_distillation_kl(current, teacher, torch.ones(1, 1))
    assert kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_a_packed_row_has_the_targets_of_its_documents_and_no_other():
    torch.manual_seed(0)
    labels = torch.randint(0, 11, (1, 9))
    logits = torch.randn(1, 9, 11)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    for offset in (1, 2, 3):
        parts = [
            ahead_logps(logits[:, place], labels[:, place], offset=offset)
            for place in (slice(0, 3), slice(3, 7), slice(7, 9))
        ]
        packed = ahead_logps(logits, labels, offset=offset, segments=segments)
        torch.testing.assert_close(packed, torch.cat(parts), rtol=0, atol=0)
        # The control: without segments, targets of the next document are counted.
        assert len(ahead_logps(logits, labels, offset=offset)) > len(packed)


def test_the_losses_of_the_parts_of_a_batch_add_up_where_totals_are_given():
    torch.manual_seed(0)
    heads = [torch.randn(5).log_softmax(0), torch.randn(3).log_softmax(0)]
    first, second = [[of_head[:2] for of_head in heads], [of_head[2:] for of_head in heads]]
    for loss in (medusa1_loss, mtp_loss, parallel_heads_loss):
        whole = loss(heads)
        parts = loss(first, totals=[5, 3]) + loss(second, totals=torch.tensor([5, 3]))
        torch.testing.assert_close(parts, whole)


def test_a_head_without_a_target_costs_nothing():
    assert medusa1_loss([HALF, HALF[:0]]).item() == pytest.approx(0.8 * math.log(2))


def test_the_teacher_has_no_gradient_and_is_its_own_best_student():
    teacher = torch.randn(1, 4, 7, requires_grad=True)
    student = teacher.detach().clone().requires_grad_()
    kl = self_distillation_kl(student, teacher, torch.ones(1, 4)).sum()
    kl.backward()
    assert teacher.grad is None
    torch.testing.assert_close(kl.detach(), torch.zeros(()), rtol=0, atol=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)


def test_totals_of_another_number_of_heads_are_refused():
    with pytest.raises(ValueError, match="expected 2, one for each head; found 1"):
        medusa1_loss([HALF, HALF], totals=[3])
