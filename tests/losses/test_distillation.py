from functools import partial

import pytest
import torch

from posttrain.losses import (
    forward_kl,
    generalised_jsd,
    generalised_jsd_with_slope,
    kl_k1,
    minillm_advantages,
    reverse_kl,
    reverse_kl_advantages,
    top_k_kl,
    top_k_kl_with_slope,
)
from tests.golden import load


def jsd(case, beta):
    student, teacher = case.student_logits.log_softmax(-1), case.teacher_logits.log_softmax(-1)
    return generalised_jsd(student, teacher, beta=beta)


def top_k(case):
    student, teacher = case.student_logits.log_softmax(-1), case.teacher_logits.log_softmax(-1)
    return top_k_kl(student.gather(-1, case.top_ids), teacher.gather(-1, case.top_ids))


DIVERGENCES = {
    "distill_forward_kl": partial(jsd, beta=0),
    "distill_reverse_kl": partial(jsd, beta=1),
    "distill_jsd_beta_0.1": partial(jsd, beta=0.1),
    "distill_jsd_beta_0.5": partial(jsd, beta=0.5),
    "distill_jsd_beta_0.9": partial(jsd, beta=0.9),
    "distill_top_k_kl": top_k,
}
ADVANTAGES = {
    "distill_advantage_discount_0": reverse_kl_advantages,
    "distill_advantage_discount_1": partial(reverse_kl_advantages, discount=1.0),
    "distill_minillm_advantage": minillm_advantages,
}


@pytest.mark.parametrize("case_id", DIVERGENCES)
def test_golden_value_and_gradient(case_id):
    case = load("distillation")[case_id]
    found = DIVERGENCES[case_id](case)
    case.check_output(found, "per_token")
    case.check(found.mean())


@pytest.mark.parametrize("case_id", ADVANTAGES)
def test_golden_advantages(case_id):
    case = load("distillation")[case_id]
    found = ADVANTAGES[case_id](case.student, case.teacher, case.mask)
    case.check_output(found, "per_token")


def test_every_golden_case_is_tested():
    assert {*DIVERGENCES, *ADVANTAGES} == set(load("distillation"))


def distributions(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, *shape, generator=draw, dtype=torch.float64) * 2
    return logits[0].requires_grad_(), logits[1].log_softmax(-1)


def test_values_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4), and two that have nothing in common."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert forward_kl(q, p).item() == pytest.approx(0.1438, abs=1e-4)
    assert reverse_kl(q, p).item() == pytest.approx(0.1308, abs=1e-4)
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    assert generalised_jsd(apart[:1], apart[1:]).item() == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_slope(beta):
    _, teacher = distributions(3, 7)
    values, slope = generalised_jsd_with_slope(teacher, teacher, beta=beta)
    assert values.abs().max() < 1e-15
    assert slope.abs().max() < 1e-15


def test_near_its_ends_the_divergence_is_beta_times_the_limit_that_is_taken_there():
    """So the loss jumps between beta 1e-4 and beta 0, which is why the ends are exceptions."""
    student, teacher = distributions(5, 7)
    student = student.log_softmax(-1)
    near = generalised_jsd(student, teacher, beta=1e-5) / 1e-5
    torch.testing.assert_close(near, forward_kl(student, teacher), rtol=1e-3, atol=1e-4)
    near = generalised_jsd(student, teacher, beta=1 - 1e-5) / 1e-5
    torch.testing.assert_close(near, reverse_kl(student, teacher), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_exchanging_the_two_exchanges_the_ends(beta):
    student, teacher = distributions(4, 9)
    student = student.log_softmax(-1)
    one = generalised_jsd(student, teacher, beta=beta)
    other = generalised_jsd(teacher, student, beta=1 - beta)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_the_slope_is_the_gradient_by_the_logits(beta):
    logits, teacher = distributions(6, 11)
    logps = logits.log_softmax(-1)
    expected = generalised_jsd(logps, teacher, beta=beta)
    values, slope = generalised_jsd_with_slope(logps.detach(), teacher, beta=beta)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), logits)[0])


def test_the_slope_of_the_top_k_is_the_gradient_where_some_places_are_empty():
    logits, teacher = distributions(6, 11)
    top, ids = teacher.topk(4, -1)
    top = top.masked_fill(torch.arange(4) >= torch.tensor([4, 3, 1, 4, 2, 4])[:, None], -torch.inf)
    logps = logits.log_softmax(-1)
    student_top = logps.gather(-1, ids).masked_fill(top == -torch.inf, -torch.inf)
    expected = top_k_kl(student_top, top)
    values, slope = top_k_kl_with_slope(logps.detach(), ids, top)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), logits)[0])


def test_the_top_of_the_whole_vocabulary_is_the_forward_kl_and_a_smaller_one_is_less():
    student, teacher = distributions(6, 11)
    student, whole = student.log_softmax(-1), None
    for k in (1, 4, 11):
        ids = teacher.topk(k, -1).indices
        found = top_k_kl(student.gather(-1, ids), teacher.gather(-1, ids))
        assert whole is None or (found >= whole - 1e-12).all()
        whole = found
    torch.testing.assert_close(whole, forward_kl(student, teacher), rtol=0, atol=1e-9)


def test_without_discount_an_advantage_is_the_negative_of_the_kl_estimate():
    draw = torch.Generator().manual_seed(1)
    student, teacher = -torch.rand(2, 3, 5, generator=draw)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    student[1, 3] = torch.nan  # masked
    found = reverse_kl_advantages(student, teacher, mask)
    assert torch.equal(found, -kl_k1(student, teacher, mask))
    assert not found.requires_grad
