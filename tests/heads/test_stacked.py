"""Stacked Medusa heads give each head's own logits, of the tokens that it was trained on."""

import pytest
import torch

from posttrain.heads import add_heads, load_heads, save_heads
from posttrain.heads.stacked import StackedHeads
from posttrain.rollouts.drafts import HeadDrafter, Row
from posttrain.rollouts.sampling import Sampling
from tests.heads.common import MAKE, prepared, stir


@pytest.fixture
def medusa():
    heads = MAKE["medusa"](prepared())
    stir(heads)
    return heads


def own_logits(medusa, hidden):
    return [
        lm_head(block(hidden))
        for block, lm_head in zip(medusa.blocks, medusa.lm_heads, strict=True)
    ]


@pytest.mark.parametrize("most", [0, 2**25])  # one by one, and in one product
def test_logits_are_each_heads_own_also_after_a_step(medusa, most, monkeypatch):
    monkeypatch.setattr("posttrain.heads.stacked.MOST_STACKED", most)
    hidden, drafting = torch.randn(3, medusa.blocks[0].layers[0].in_features), StackedHeads(medusa)
    for _ in range(2):
        with torch.no_grad():
            expected = torch.stack(own_logits(medusa, hidden))
            torch.testing.assert_close(drafting(hidden), expected, rtol=1e-5, atol=1e-5)
            for weight in medusa.parameters():
                weight.add_(0.1)  # an optimizer's step


def test_tokens_that_were_trained_on_are_drafted_alone_and_saved(medusa, tmp_path):
    model = prepared()
    size = medusa.lm_heads[0].out_features
    counts = [int(token % 5 == 2) for token in range(size)]
    medusa.draft_tokens_of(counts)
    ids = [token for token, count in enumerate(counts) if count]
    assert medusa.drafted_ids == ids
    add_heads(model, medusa)
    model.save_pretrained(tmp_path)
    save_heads(model, tmp_path)
    loaded = load_heads(tmp_path, model)
    assert loaded.drafted_ids == ids
    hidden = torch.randn(2, medusa.blocks[0].layers[0].in_features)
    with torch.no_grad():
        expected = torch.stack(own_logits(medusa, hidden))[..., ids]
    torch.testing.assert_close(loaded.draft_logits(hidden), expected, rtol=1e-5, atol=1e-5)
    drafter = HeadDrafter(loaded, [(0,), (1,), (0, 0)])
    drafter.begin([(5, 6)], Sampling(9, (2, 3), temperature=0.0))
    rows = [Row(n, (5, 6), [0.5] * 9, n, [7]) for n in range(2)]
    for draft, logits in zip(drafter.propose(rows, 2, hidden), expected.unbind(1), strict=True):
        best = logits.topk(2).indices
        first, second, below = (ids[best[depth][rank]] for depth, rank in ((0, 0), (0, 1), (1, 0)))
        assert draft.token_ids == [first, second, below]


def test_all_tokens_are_drafted_where_most_were_trained_on(medusa):
    medusa.draft_tokens_of([1] * medusa.lm_heads[0].out_features)
    assert medusa.drafted_ids is None
