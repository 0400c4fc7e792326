import pytest
import torch

from posttrain.losses import masked_mean, masked_sum, token_weights
from tests.golden import load


def reduced(case, **settings):
    return (case.loss_mat * token_weights(case.mask, **settings)).sum()


GOLDEN = {
    "reduce_token_mean": lambda c: reduced(c, per="token"),
    "reduce_seq_mean_all": lambda c: reduced(c, per="sequence", total=len(c.mask)),
    "reduce_seq_mean_nonempty": lambda c: reduced(c, per="sequence"),
    "reduce_seq_sum_all": lambda c: reduced(c, per="constant", length=1),
    "reduce_const_per_row": lambda c: reduced(c, per="constant", length=c.L),
    "reduce_const_no_batch": lambda c: reduced(c, per="constant", length=c.L, total=1),
}


@pytest.mark.parametrize("case_id", GOLDEN)
def test_golden_value_and_gradient(case_id):
    case = load("reduction")[case_id]
    case.check(GOLDEN[case_id](case))


def test_micro_batches_with_the_global_count_add_up_to_the_global_mean():
    case = load("reduction")["reduce_grad_accumulation"]
    micro_batches = [case.micro1.unsqueeze(0), case.micro2.unsqueeze(0)]
    ones = [torch.ones_like(batch) for batch in micro_batches]

    parts = [
        (batch * token_weights(mask, total=10)).sum()
        for batch, mask in zip(micro_batches, ones, strict=True)
    ]
    case.check_output(sum(parts), "global_token_mean")

    naive = [
        (batch * token_weights(mask)).sum() for batch, mask in zip(micro_batches, ones, strict=True)
    ]
    case.check_output(sum(naive) / 2, "naive_mean_of_means")


def test_every_golden_case_is_tested():
    assert GOLDEN.keys() | {"reduce_grad_accumulation"} == load("reduction").keys()


MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).double()


@pytest.mark.parametrize(
    ("settings", "total"),
    [
        ({"per": "token"}, 6),
        ({"per": "sequence"}, 3),
        ({"per": "group", "group_size": 2}, 2),
        ({"per": "constant", "length": 7}, 4),
    ],
)
def test_split_into_micro_batches_changes_nothing_under_a_global_total(settings, total):
    whole = token_weights(MASK, total=total, **settings)
    split = torch.cat([token_weights(half, total=total, **settings) for half in MASK.split(2)])
    torch.testing.assert_close(split, whole, rtol=0, atol=0)
    torch.testing.assert_close(token_weights(MASK, **settings), whole)


def test_weights_by_hand():
    """Three tokens in two rows: a third each per token; a half for each row per sequence."""
    mask = torch.tensor([[True, True], [True, False]])
    third, half, quarter = 1 / 3, 1 / 2, 1 / 4
    assert_weights(token_weights(mask), [[third, third], [third, 0]])
    assert_weights(token_weights(mask, per="sequence"), [[quarter, quarter], [half, 0]])
    assert_weights(token_weights(mask, per="group", group_size=2), [[third, third], [third, 0]])
    assert_weights(
        token_weights(mask, per="constant", length=2), [[quarter, quarter], [quarter, 0]]
    )


def assert_weights(weights, expected):
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_total_may_be_a_tensor_counted_over_ranks():
    torch.testing.assert_close(
        token_weights(MASK, total=torch.tensor(12)), token_weights(MASK, total=12)
    )


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_batch_without_a_trained_token_weighs_zero_not_nan(per):
    assert (token_weights(torch.zeros(2, 3), per=per) == 0).all()


def test_empty_rows_and_groups_leave_the_denominator():
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert token_weights(mask, per="sequence").sum() == 1
    assert token_weights(mask, per="group", group_size=1).sum() == 1
    assert token_weights(mask, per="sequence", total=2).sum() == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per": "batch"}, "expected one of token, sequence, group, constant; found 'batch'"),
        ({"per": "constant"}, "length goes with"),
        ({"per": "token", "length": 3}, "length goes with"),
        ({"per": "group"}, "group_size goes with"),
        ({"per": "group", "group_size": 3}, "4 rows, not a multiple of group_size=3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        token_weights(MASK, **settings)


def test_masked_sum_and_mean_leave_nan_out():
    values = torch.tensor([1.0, 2.0, torch.nan], requires_grad=True)
    mask = torch.tensor([True, True, False])
    assert masked_sum(values, mask) == 3
    masked_mean(values, mask).backward()
    assert values.grad.tolist() == [0.5, 0.5, 0.0]
    assert masked_mean(values.detach(), torch.zeros(3)) == 0
