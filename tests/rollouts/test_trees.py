"""Medusa's trees and ways to accept, against golden cases and by hand."""

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.rollouts.trees import (
    PUBLISHED,
    check_tree,
    cut,
    optimised_tree,
    tree_mask,
    typical_acceptance,
)
from tests.golden import load


def test_the_optimised_tree_is_the_golden_one():
    """Golden case medusa_optimised_tree."""
    accuracy = [[0.6, 0.2, 0.1], [0.5, 0.25, 0.05], [0.4, 0.2, 0.1]]
    nodes, expected = optimised_tree(accuracy, 6)
    assert nodes == [(0,), (0, 0), (1,), (0, 1), (0, 0, 0), (1, 0)]
    assert expected == pytest.approx(1.47, abs=1e-12)


def test_the_optimised_tree_takes_a_later_rank_first_where_it_is_right_more_often():
    nodes, expected = optimised_tree([[0.1, 0.5]], 1)
    assert (nodes, expected) == ([(1,)], 0.5)


def test_the_tree_mask_is_the_golden_one():
    """Golden case medusa_tree_buffers: each node sees the root, its ancestors and itself."""
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],
        [1, 0, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 0, 0, 1],
    ]
    choices = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
    assert tree_mask(choices).int().tolist() == expected


def test_the_published_tree_is_whole():
    """63 nodes of four levels and ranks below 10, each behind its parent."""
    assert len(set(PUBLISHED)) == 63
    assert {len(path) for path in PUBLISHED} == {1, 2, 3, 4}
    check_tree(PUBLISHED, 4)
    check_tree(cut(PUBLISHED, 2), 2)
    assert max(rank for path in PUBLISHED for rank in path) == 9


def test_a_tree_that_heads_cannot_fill_is_refused():
    with pytest.raises(ConfigError, match="at most the 3 levels that the heads have, found 4"):
        check_tree(PUBLISHED, 3)
    with pytest.raises(ConfigError, match=r"the parent \(0,\) of \(0, 1\), found none"):
        check_tree([(1,), (0, 1)], 2)


def test_typical_acceptance_is_the_golden_case():
    case = load("drafting")["medusa_typical_acceptance"]
    settings = {name: getattr(case, name) for name in ("temperature", "epsilon", "delta")}
    accepted = typical_acceptance(case.logits, case.candidates, **settings)
    assert accepted.tolist() == case.expected("accept_len").tolist()


def test_typical_acceptance_is_not_exact_and_greedy_is():
    """Of two tokens with probabilities 0.5 both are accepted; decoding would choose one."""
    logits, candidates = torch.zeros(2, 2, 2), torch.tensor([[0, 0], [0, 1]])
    settings = {"temperature": 1.0, "epsilon": 0.4, "delta": 0.9}
    assert typical_acceptance(logits, candidates, **settings).tolist() == [1, 1]
    case = load("drafting")["medusa_greedy_acceptance"]
    right = case.logits[:, :-1].argmax(-1) == case.candidates[:, 1:]
    assert right.long().cumprod(-1).sum(-1).tolist() == case.expected("accept_len").tolist()
