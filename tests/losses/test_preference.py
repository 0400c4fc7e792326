import inspect
import math

import pytest
import torch

from posttrain import losses
from posttrain.losses import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    apo_zero_unpaired_loss,
    bco_pair_loss,
    bco_unpaired_loss,
    cdpo_loss,
    cpo_loss,
    discopop_loss,
    dpo_length_norm_loss,
    dpo_loss,
    exo_loss,
    fdpo_forward_kl_loss,
    fdpo_js_loss,
    hinge_loss,
    ipo_avg_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    nca_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
    sppo_loss,
)
from tests.golden import load


def paired(loss, **settings):
    return lambda c: loss(c.w, c.l, c.rw, c.rl, beta=c.beta, **settings).mean()


def smoothed(loss):
    return lambda c: paired(loss, label_smoothing=c.eps)(c)


def lengths(c):
    return {"chosen_lengths": c.len_w, "rejected_lengths": c.len_l}


def unpaired(c):
    return c.logp, c.ref, c.label


def kto(c):
    z0 = kto_reference_point(c.kl_logp, c.kl_ref)
    c.check_output(z0, "z0")
    weights = (c.lambda_D, c.lambda_U)
    return kto_loss(*unpaired(c), reference_point=z0, beta=c.beta, weights=weights).mean()


GOLDEN = {
    "dpo_sigmoid": paired(dpo_loss),
    "dpo_hinge": paired(hinge_loss),
    "dpo_ipo_sum": paired(ipo_loss),
    "dpo_ipo_avg": lambda c: paired(ipo_avg_loss, **lengths(c))(c),
    "dpo_cdpo": smoothed(cdpo_loss),
    "dpo_robust": smoothed(robust_dpo_loss),
    "dpo_exo_pair": smoothed(exo_loss),
    "dpo_nca_pair": paired(nca_loss),
    "dpo_bco_pair": paired(bco_pair_loss),
    "dpo_sppo_hard": paired(sppo_loss),
    "dpo_aot": smoothed(aot_loss),
    "dpo_aot_unpaired": smoothed(aot_unpaired_loss),
    "dpo_apo_zero": paired(apo_zero_loss),
    "dpo_apo_down": paired(apo_down_loss),
    "dpo_discopop": lambda c: paired(discopop_loss, tau=c.tau)(c),
    "dpo_length_norm": lambda c: paired(dpo_length_norm_loss, **lengths(c))(c),
    "fdpo_forward_kl": paired(fdpo_forward_kl_loss),
    "fdpo_js_divergence": paired(fdpo_js_loss),
    "cpo_sigmoid": lambda c: cpo_loss(
        c.w, c.l, chosen_lengths=c.len_w, beta=c.beta, alpha=0.0
    ).mean(),
    "cpo_with_nll": lambda c: cpo_loss(
        c.w, c.l, chosen_lengths=c.len_w, beta=c.beta, alpha=c.alpha
    ).mean(),
    "simpo": lambda c: simpo_loss(c.w, c.l, **lengths(c), beta=c.beta, gamma=c.gamma).mean(),
    "orpo": lambda c: orpo_loss(c.w, c.l, **lengths(c), lam=c.lam).mean(),
    "kto": kto,
    "kto_apo_zero_unpaired": lambda c: apo_zero_unpaired_loss(
        *unpaired(c), beta=c.beta, weights=(c.lambda_D, c.lambda_U)
    ).mean(),
    "bco_unpaired": lambda c: bco_unpaired_loss(
        *unpaired(c), beta=c.beta, reward_shift=c.delta
    ).mean(),
}


@pytest.mark.parametrize("case_id", GOLDEN)
def test_golden_value_and_gradient(case_id):
    case = load("preference")[case_id]
    case.check(GOLDEN[case_id](case))


def test_every_golden_case_is_tested():
    assert GOLDEN.keys() == load("preference").keys()


LOG2 = math.log(2)
AT_THE_REFERENCE = {
    dpo_loss: LOG2,
    dpo_length_norm_loss: LOG2,
    hinge_loss: 1.0,
    ipo_loss: 25.0,
    ipo_avg_loss: 25.0,
    cdpo_loss: LOG2,
    robust_dpo_loss: LOG2,
    exo_loss: 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    discopop_loss: (LOG2 + 1) / 2,
    aot_loss: LOG2,
    aot_unpaired_loss: LOG2,
    fdpo_forward_kl_loss: LOG2,
    fdpo_js_loss: LOG2,
    nca_loss: 2 * LOG2,
    bco_pair_loss: 2 * LOG2,
    sppo_loss: 50.0,
    apo_zero_loss: 1.0,
    apo_down_loss: 1.0,
}
REFERENCE_FREE = [simpo_loss, cpo_loss, orpo_loss]


def call(loss, chosen, rejected, ref_chosen, ref_rejected):
    """Pass what the signature names, as a trainer does; β = 0.1, ε = 0.1."""
    count = torch.full_like(chosen, 4).detach()
    offered = {
        "ref_chosen": ref_chosen,
        "ref_rejected": ref_rejected,
        "chosen_lengths": count,
        "rejected_lengths": count,
        "beta": 0.1,
        "label_smoothing": 0.1,
    }
    names = inspect.signature(loss).parameters
    return loss(chosen, rejected, **{k: v for k, v in offered.items() if k in names})


@pytest.mark.parametrize("loss", AT_THE_REFERENCE, ids=lambda f: f.__name__)
def test_loss_where_policy_equals_reference(loss):
    """The value that each docstring gives, whatever the answers' log-probs are."""
    chosen, rejected = torch.tensor([-12.0, -3.0]), torch.tensor([-40.0, -5.0])
    found = call(loss, chosen, rejected, chosen, rejected)
    torch.testing.assert_close(found, torch.full((2,), AT_THE_REFERENCE[loss]))


MONOTONE = [loss for loss in [*AT_THE_REFERENCE, *REFERENCE_FREE] if loss is not discopop_loss]


@pytest.mark.parametrize("loss", MONOTONE, ids=lambda f: f.__name__)
def test_a_small_step_down_the_gradient_prefers_the_chosen_answer(loss):
    chosen = torch.tensor([-12.0], requires_grad=True)
    rejected = torch.tensor([-12.5], requires_grad=True)
    call(loss, chosen, rejected, chosen.detach(), rejected.detach()).sum().backward()
    assert chosen.grad < rejected.grad


@pytest.mark.parametrize("loss", [*AT_THE_REFERENCE, *REFERENCE_FREE], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_log_probs_stay_finite(loss, sign):
    chosen = torch.tensor([-1e4, -5e3, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, -1e4, -1e4], requires_grad=True)
    reference = torch.tensor([-5e3, 0.0, -5e3])
    found = call(loss, *(chosen, rejected)[::sign], reference, reference.flip(0))
    found.sum().backward()
    assert found.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("loss", [*AT_THE_REFERENCE, *REFERENCE_FREE], ids=lambda f: f.__name__)
def test_bfloat16_is_raised_to_float32_before_anything_is_subtracted(loss):
    """All four are bfloat16 numbers; -100 + 1.0078125 is not and would become -99."""
    exact = [torch.tensor([x]) for x in (-100.0, -101.0, -1.0078125, -3.015625)]
    found = call(loss, *(x.bfloat16() for x in exact))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, call(loss, *exact))


def test_dpo_gradient_is_beta_times_the_probability_of_being_wrong():
    """-β σ(-z) for chosen, the opposite for rejected (DPO, section 4)."""
    chosen, rejected = torch.tensor([-1.0]).requires_grad_(), torch.tensor([-4.0]).requires_grad_()
    ref = torch.tensor([-2.0])
    dpo_loss(chosen, rejected, ref, ref, beta=0.5).sum().backward()
    wrong = 1 / (1 + math.exp(0.5 * 3.0))
    assert chosen.grad.item() == pytest.approx(-0.5 * wrong)
    assert rejected.grad.item() == pytest.approx(0.5 * wrong)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    return [-20 * torch.rand(6, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("smoothed_loss", [cdpo_loss, robust_dpo_loss])
def test_without_smoothing_it_is_dpo(smoothed_loss, pairs):
    found = smoothed_loss(*pairs, beta=0.1, label_smoothing=0.0)
    torch.testing.assert_close(found, dpo_loss(*pairs, beta=0.1))


def test_cdpo_gradient_vanishes_at_its_target_probability():
    """σ(z) = 1 - ε at z = log((1 - ε)/ε)."""
    chosen = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    zero = torch.zeros(1)
    cdpo_loss(chosen, zero, zero, zero, beta=1.0, label_smoothing=0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(0, abs=1e-7)


def test_robust_loss_is_unbiased_under_flipped_labels(pairs):
    """(1-ε) times the loss on the true label plus ε times that on the flipped one is DPO's."""
    chosen, rejected, ref_chosen, ref_rejected = pairs
    true = robust_dpo_loss(*pairs, label_smoothing=0.2)
    flipped = robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, label_smoothing=0.2)
    torch.testing.assert_close(0.8 * true + 0.2 * flipped, dpo_loss(*pairs))


def test_hinge_has_no_gradient_once_the_margin_is_won():
    chosen, zero = torch.tensor([25.0], requires_grad=True), torch.zeros(1)
    loss = hinge_loss(chosen, zero, zero, zero, beta=0.05)
    loss.sum().backward()
    assert loss.item() == chosen.grad.item() == 0


def test_ipo_is_zero_at_its_target_margin():
    """β = 0.1: a margin of 1/(2β) = 5 nats."""
    zero = torch.zeros(1)
    assert ipo_loss(torch.tensor([5.0]), zero, zero, zero, beta=0.1).item() == 0


@pytest.mark.parametrize(
    ("normalised", "summed"), [(dpo_length_norm_loss, dpo_loss), (ipo_avg_loss, ipo_loss)]
)
def test_length_normalised_loss_of_one_token_answers_is_the_summed_one(normalised, summed, pairs):
    one = torch.ones(6)
    found = normalised(*pairs, chosen_lengths=one, rejected_lengths=one, beta=0.3)
    torch.testing.assert_close(found, summed(*pairs, beta=0.3))


def test_exo_diverges_from_its_target_by_nothing_at_the_target():
    z, zero = torch.tensor([math.log(0.9 / 0.1)]), torch.zeros(1)
    assert exo_loss(z, zero, zero, zero, beta=1.0, label_smoothing=0.1).item() == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
def test_aot_of_one_pair_is_dpo_and_of_a_batch_ignores_its_order(loss, pairs):
    one = [x[:1] for x in pairs]
    torch.testing.assert_close(loss(*one, beta=0.1), dpo_loss(*one, beta=0.1))
    mixed = [x.flip(0) for x in pairs]
    torch.testing.assert_close(loss(*mixed, beta=0.1), loss(*pairs, beta=0.1))


def test_bco_pair_is_the_two_unpaired_losses(pairs):
    chosen, rejected, ref_chosen, ref_rejected = pairs
    good = bco_unpaired_loss(chosen, ref_chosen, torch.ones(6).bool())
    bad = bco_unpaired_loss(rejected, ref_rejected, torch.zeros(6).bool())
    torch.testing.assert_close(good + bad, bco_pair_loss(*pairs))


def test_apo_zero_pair_is_the_two_unpaired_losses_and_kto_at_zero(pairs):
    chosen, rejected, ref_chosen, ref_rejected = pairs
    yes, no = torch.ones(6).bool(), torch.zeros(6).bool()
    good = apo_zero_unpaired_loss(chosen, ref_chosen, yes)
    bad = apo_zero_unpaired_loss(rejected, ref_rejected, no)
    torch.testing.assert_close(good + bad, apo_zero_loss(*pairs))
    torch.testing.assert_close(
        kto_loss(rejected, ref_rejected, no, reference_point=torch.tensor(0.0)), bad
    )


def test_kto_costs_half_its_weight_at_the_reference_point():
    logps, marks = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    found = kto_loss(
        logps, torch.zeros(2), marks, reference_point=torch.tensor(2.0), weights=(1.0, 1.5)
    )
    torch.testing.assert_close(found, torch.tensor([0.5, 0.75]))


def test_kto_passes_no_gradient_through_its_reference_point():
    z0 = torch.tensor(0.3, requires_grad=True)
    logps = torch.tensor([2.0])
    assert not kto_loss(logps, logps, torch.tensor([True]), reference_point=z0).requires_grad


def test_kto_reference_point_is_cut_at_zero_and_has_no_gradient():
    """h of 1 and -3 have the mean -1."""
    logps = torch.tensor([1.0, -3.0], requires_grad=True)
    z0 = kto_reference_point(logps, torch.zeros(2))
    assert z0.item() == 0
    assert not z0.requires_grad


def test_simpo_of_equal_mean_log_probs_costs_log_two():
    """-6 over 3 tokens and -4 over 2 are both -2 per token."""
    found = simpo_loss(
        torch.tensor([-6.0]),
        torch.tensor([-4.0]),
        chosen_lengths=torch.tensor([3]),
        rejected_lengths=torch.tensor([2]),
        gamma=0.0,
    )
    assert found.item() == pytest.approx(LOG2)


def test_cpo_without_anchor_is_dpo_under_a_uniform_reference(pairs):
    chosen, rejected, ref, _ = pairs
    found = cpo_loss(chosen, rejected, chosen_lengths=torch.ones(6), beta=0.1, alpha=0.0)
    torch.testing.assert_close(found, dpo_loss(chosen, rejected, ref, ref, beta=0.1))


def test_orpo_at_probability_one_half_per_token_costs_log_two_twice():
    half = torch.tensor([3 * math.log(0.5)])
    three = torch.tensor([3])
    found = orpo_loss(half, half, chosen_lengths=three, rejected_lengths=three, lam=1.0)
    assert found.item() == pytest.approx(2 * LOG2)


def test_orpo_is_accurate_for_answers_of_probability_near_one():
    """odds of p = 1 - 1e-6 against 1 - 2e-6: log odds differ by log 2 to 1e-6; σ(log 2) = 2/3."""
    chosen, rejected = torch.tensor([-1e-6]), torch.tensor([-2e-6])
    one = torch.tensor([1])
    found = orpo_loss(chosen, rejected, chosen_lengths=one, rejected_lengths=one, lam=1.0)
    assert found.item() == pytest.approx(math.log(1.5), abs=1e-5)


@pytest.mark.parametrize("loss", [cpo_loss, orpo_loss])
def test_micro_batches_with_the_whole_batchs_mean_length_add_up(loss):
    chosen, rejected = torch.tensor([-3.0, -8.0]), torch.tensor([-4.0, -6.0])
    count = torch.tensor([2.0, 6.0])

    def run(rows, **settings):
        names = inspect.signature(loss).parameters
        by_name = {"chosen_lengths": count[rows], "rejected_lengths": count[rows]}
        given = {k: v for k, v in by_name.items() if k in names}
        return loss(chosen[rows], rejected[rows], **given, **settings)

    parts = [run(slice(i, i + 1), mean_chosen_length=4.0) for i in range(2)]
    torch.testing.assert_close(torch.cat(parts), run(slice(0, 2)))


@pytest.mark.parametrize(
    ("loss", "wrong"), [(cdpo_loss, 0.5), (robust_dpo_loss, 0.5), (aot_loss, -0.1), (exo_loss, 0.0)]
)
def test_smoothing_out_of_range_is_refused(loss, wrong, pairs):
    with pytest.raises(ValueError, match=f"found {wrong}"):
        loss(*pairs, label_smoothing=wrong)


def test_every_exported_name_exists_and_is_documented():
    for name in losses.__all__:
        exported = getattr(losses, name)
        assert not callable(exported) or "By hand" in " ".join(exported.__doc__.split()), name
