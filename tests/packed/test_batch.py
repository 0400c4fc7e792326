import pytest
import torch
from torch.overrides import TorchFunctionMode

from posttrain.packed.batch import (
    Segment,
    pack,
    pack_documents,
    pack_groups,
    pack_pairs,
    split_by_tokens,
)

PAIR = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 1], "rejected_ids": [9, 10, 1]}


def test_a_pair_holds_its_prompt_once_and_both_answers_continue_its_positions():
    batch = pack_pairs([PAIR], device="cpu")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 9, 10, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]


def test_the_first_token_of_an_answer_is_predicted_by_the_prompts_last_position():
    batch = pack_pairs([PAIR], device="cpu")
    assert batch.predictors.tolist() == [2, 3, 2, 5, 6]
    assert batch.targets.tolist() == [8, 1, 9, 10, 1]


def test_dense_puts_each_scored_token_at_its_row_and_column():
    batch = pack_pairs([PAIR], device="cpu")
    dense = batch.dense(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert dense.tolist() == [[1, 2, 0], [3, 4, 5]]
    assert batch.mask().tolist() == [[1, 1, 0], [1, 1, 1]]


def test_only_trained_tokens_of_a_document_are_scored():
    document = {"input_ids": [4, 5, 6, 7], "trained": [False, True, False, True]}
    batch = pack_documents([document, document], device="cpu")
    assert batch.predictors.tolist() == [0, 2, 4, 6]
    assert batch.targets.tolist() == [5, 7, 5, 7]
    assert batch.rows.tolist() == [0, 0, 1, 1]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]


def test_a_chain_of_segments_sees_all_its_ancestors():
    batch = pack([Segment([2, 3]), Segment([4], 0), Segment([5, 6], 1)], num_rows=0, device="cpu")
    assert batch.layout.key_ranges(2) == [(0, 2), (2, 3), (3, 5)]
    assert batch.layout.longest_path == 5


def test_what_nothing_predicts_cannot_be_scored():
    with pytest.raises(ValueError, match="nothing predicts it"):
        pack([Segment([2, 3], scored=[True, True])], num_rows=1, device="cpu")


def test_a_parent_must_come_first():
    with pytest.raises(ValueError, match="does not precede"):
        pack([Segment([2], parent=1), Segment([3])], num_rows=1, device="cpu")


GROUPS = ([[5, 6], [7]], [[[8, 1], [9, 10, 1]], [[11]]])  # two prompts, three completions


class CountCopies(TorchFunctionMode):
    """Counts the copies to a device that run inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.Tensor.to, torch.Tensor.cuda)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("as_row", [list, torch.tensor])
def test_columns_lie_where_the_scored_tokens_lie_and_are_zero_elsewhere(as_row):
    rows = [as_row(row) for row in ([0.5, -1.0], [2.0, 3.0, float("nan")], [4.0])]
    batch = pack_groups(
        *GROUPS,
        device="cpu",
        token_columns={"old_logps": rows},
        row_columns={"advantages": [7, 8, 9]},
    )
    old = batch.column("old_logps")
    assert old.dtype == torch.float32
    assert old.nan_to_num(99.0).tolist() == [[0.5, -1, 0], [2, 3, 99], [4, 0, 0]]
    assert batch.row_column("advantages").tolist() == [7, 8, 9]
    assert batch.has_column("old_logps")
    assert not batch.has_column("ref_logps")


def test_the_mask_is_made_once():
    batch = pack_groups(*GROUPS, device="cpu")
    assert batch.mask() is batch.mask()
    assert torch.equal(batch.mask(), batch.dense(torch.ones(6)))


def test_a_batch_with_all_its_columns_is_two_copies():
    """Ten integer and float tensors for the device, in one buffer of each kind."""
    columns = {name: [[1.0, 2.0], [3.0] * 3, [4.0]] for name in ("old_logps", "ref_logps")}
    with CountCopies() as copies:
        pack_groups(*GROUPS, device="cpu", token_columns=columns, row_columns={"score": [1, 2, 3]})
    assert copies.count == 2


def test_columns_that_do_not_fit_or_do_not_exist_are_named():
    with pytest.raises(ValueError, match=r"'old', row 1: expected 3 numbers.* found 2"):
        pack_groups(*GROUPS, device="cpu", token_columns={"old": [[1, 2], [1, 2], [1]]})
    with pytest.raises(ValueError, match=r"'old': expected 3 sequences.* found 2"):
        pack_groups(*GROUPS, device="cpu", token_columns={"old": [[1, 2], [1, 2, 3]]})
    with pytest.raises(ValueError, match=r"'score': expected 3 numbers.* found 1"):
        pack_groups(*GROUPS, device="cpu", row_columns={"score": [1.0]})
    batch = pack_groups(*GROUPS, device="cpu", row_columns={"score": [1, 2, 3]})
    with pytest.raises(ValueError, match="no token column 'score'; it was packed with: none"):
        batch.column("score")
    with pytest.raises(ValueError, match="no row column 'old'; it was packed with: score"):
        batch.row_column("old")


def test_the_ends_of_segments_and_of_completions_are_known():
    batch = pack_groups(*GROUPS, device="cpu")
    assert batch.segment_ends.tolist() == [1, 3, 6, 7, 8]
    assert batch.child_ends.tolist() == [3, 6, 8]


def test_splitting_keeps_every_example_once_and_within_the_bound():
    sizes = [7, 3, 9, 1, 4, 4, 12, 2]
    parts = split_by_tokens(sizes, 13)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert max(sum(sizes[i] for i in part) for part in parts) <= 13


def test_an_example_above_the_bound_gets_a_part_of_its_own():
    assert [0] in split_by_tokens([50, 3, 4], 10)


def test_parts_beyond_the_examples_are_empty():
    parts = split_by_tokens([5], 10, min_parts=3)
    assert sorted(map(len, parts)) == [0, 0, 1]


def test_examples_that_do_not_fit_in_pairs_get_parts_of_their_own():
    """18 tokens would fill two parts of 10, but no two of 6 fit together."""
    assert split_by_tokens([6, 6, 6], 10) == [[0], [1], [2]]
