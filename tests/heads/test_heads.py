"""Heads in a packed forward against a plain computation of each document by itself."""

import copy

import pytest
import torch
import torch.nn.functional as F

from posttrain.errors import ConfigError
from posttrain.heads import MTPModules, add_heads, heads_of, scores_ahead, tokens_ahead
from posttrain.heads.stacked import StackedHeads
from posttrain.losses import ahead_logps
from posttrain.packed import head as packed_head
from posttrain.packed.batch import Segment, pack
from posttrain.packed.forward import packed_logps
from posttrain.packed.rows import compute_rows
from tests.conftest import count_chunks, make_model
from tests.heads.common import MAKE, prepared, row_of_documents, stir

CLOSE = {"rtol": 0, "atol": 1e-5}


def plain_states(model, ids):
    """(1, T, D) inputs of the last layer and outputs of the norm, by an ordinary forward."""
    out = model.base_model(ids, use_cache=False, output_hidden_states=True)
    return out.hidden_states[-2], out.last_hidden_state


def plain_logits(model, heads, ids):
    """Logits of each head on one document, (K, 1, T, V), from the formulas."""
    before, states = plain_states(model, ids)
    embed, lm_head, norm = model.get_input_embeddings(), model.lm_head.weight, model.model.norm
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(states, positions)
    found = []
    if heads.kind == "medusa":
        for block, own in zip(heads.blocks, heads.lm_heads, strict=True):
            inner = block.layers[0]
            mixed = states + F.silu(states @ inner.weight.T + inner.bias)
            found.append(mixed @ own.weight.T)
        return found
    for depth, module in enumerate(heads.layers, 1):
        if heads.kind == "parallel":
            found.append(norm(module(before, position_embeddings=rotary)) @ lm_head.T)
            continue
        shifted = torch.cat((ids[:, depth:], ids.new_zeros(1, min(depth, ids.shape[1]))), 1)
        parts = [module.enorm(embed(shifted)), module.hnorm(states)]
        if heads.order == "hidden_embedding":
            parts.reverse()
        mixed = module.eh_proj(torch.cat(parts, -1))
        states = module.norm(module.block(mixed, position_embeddings=rotary))
        found.append(states @ lm_head.T)
    return found


def plain_logps(model, heads, segments):
    """Log-probs of the targets of each head, all documents in their order."""
    by_head = [[] for _ in range(heads.depth)]
    for segment in segments:
        ids = torch.tensor([segment.token_ids])
        labels = ids.where(torch.tensor([segment.scored]), -100)
        for k, logits in enumerate(plain_logits(model, heads, ids)):
            by_head[k].append(ahead_logps(logits, labels, offset=k + 2))
    return [torch.cat(parts) for parts in by_head]


@pytest.mark.parametrize("kind", MAKE)
def test_packed_heads_are_those_of_a_plain_computation_in_value_and_gradient(kind):
    segments, batch = row_of_documents()
    packed, plain = prepared("qwen3"), make_model("qwen3", num_hidden_layers=2)
    heads = stir(MAKE[kind](packed))
    copied = copy.deepcopy(heads)
    add_heads(packed, heads)
    found = scores_ahead(packed, batch, segments, with_base=True)
    expected = plain_logps(plain, copied, segments)
    alone = packed_logps(prepared("qwen3"), batch)
    torch.testing.assert_close(found.base.logps, alone.logps, **CLOSE)
    for ours, theirs in zip(found.heads, expected, strict=True):
        torch.testing.assert_close(ours.logps, theirs, **CLOSE)
    sum(k * scores.logps.sum() for k, scores in enumerate(found.heads, 1)).backward()
    sum(k * logps.sum() for k, logps in enumerate(expected, 1)).backward()
    for (name, ours), theirs in zip(heads.named_parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    theirs = dict(plain.named_parameters())
    for name, ours in packed.named_parameters():
        if not name.startswith("lookahead.") and theirs[name].grad is not None:
            torch.testing.assert_close(ours.grad, theirs[name].grad, rtol=1e-4, atol=1e-4, msg=name)


def test_no_target_crosses_a_document_and_the_control_shows_it():
    segments, _ = row_of_documents()
    for offset, ahead in enumerate(tokens_ahead(segments, (1, 2, 3), device="cpu"), 1):
        ends = torch.tensor([5, 14, 16, 28])
        owner = torch.searchsorted(ends, ahead.positions, right=True)
        at = torch.searchsorted(ends, ahead.positions + offset, right=True)
        torch.testing.assert_close(owner, at)
        ids = torch.tensor([i for segment in segments for i in segment.token_ids])
        torch.testing.assert_close(ahead.targets, ids[ahead.positions + offset])
    joined = [i for segment in segments for i in segment.token_ids]
    scored = [s for segment in segments for s in segment.scored]
    (as_one,) = tokens_ahead([Segment(joined, scored=scored)], (3,), device="cpu")
    assert len(as_one.positions) > len(ahead.positions)  # as one document, they do cross


def test_a_document_beside_another_changes_neither_log_probs_nor_gradients():
    def of(lengths):
        model = prepared()
        add_heads(model, stir(MAKE["mtp"](model)))
        segments, batch = row_of_documents(lengths)
        found = scores_ahead(model, batch, segments, with_base=False).heads[1].logps[:2]
        found.sum().backward()
        return found, heads_of(model).layers[0].eh_proj.weight.grad

    for ours, theirs in zip(of((5,)), of((5, 9)), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_targets_of_completions_reach_back_into_their_prompt():
    segments = [
        Segment([7, 8, 9]),
        Segment([20, 21], 0, scored=[True, True], row=0),
        Segment([30, 31, 32], 0, scored=[True, True, False], row=1),
    ]
    second, third, fifth = tokens_ahead(segments, (2, 3, 5), device="cpu")
    assert second.positions.tolist() == [1, 2, 1, 2]
    assert second.targets.tolist() == [20, 21, 30, 31]
    assert third.positions.tolist() == [0, 1, 0, 1]
    assert fifth.positions.tolist() == []


def test_medusa_on_a_shared_prompt_is_medusa_on_each_whole_sequence():
    model = prepared()
    add_heads(model, stir(MAKE["medusa"](model)))
    prompt, completions = [7, 8, 9, 10], ([20, 21, 22], [30, 31])
    shared = [Segment(prompt)] + [
        Segment(c, 0, scored=[True] * len(c), row=row) for row, c in enumerate(completions)
    ]
    alone = [
        Segment(prompt + c, scored=[False] * 4 + [True] * len(c), row=row)
        for row, c in enumerate(completions)
    ]
    both = [
        scores_ahead(model, pack(x, num_rows=2, device="cpu"), x, with_base=True)
        for x in (shared, alone)
    ]
    for ours, theirs in zip(*([b.base, *b.heads] for b in both), strict=True):
        torch.testing.assert_close(ours.logps, theirs.logps, **CLOSE)


def test_modules_do_not_take_a_prompt_with_several_next_tokens():
    model = prepared()
    add_heads(model, MAKE["mtp"](model))
    segments = [Segment([7, 8]), Segment([20], 0, scored=[True])]
    batch = pack(segments, num_rows=1, device="cpu")
    with pytest.raises(ValueError, match="no one next token"):
        scores_ahead(model, batch, segments, with_base=True)


@pytest.mark.parametrize("kind", MAKE)
def test_a_detached_head_leaves_no_gradient_in_the_model(kind):
    model = prepared()
    add_heads(model, stir(MAKE[kind](model)))
    segments, batch = row_of_documents()
    found = scores_ahead(model, batch, segments, with_base=False, detach=True)
    sum(scores.logps.sum() for scores in found.heads).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == name.startswith("lookahead."), name


@pytest.mark.parametrize("kind", ["medusa", "mtp"])
def test_no_more_than_one_chunk_of_logits_exists_at_once(kind, monkeypatch):
    """Two tokens a chunk: as many calls as chunks, and none of more logits."""
    monkeypatch.setattr(packed_head, "CHUNK_ENTRIES", 2 * 97)
    model = prepared()
    add_heads(model, MAKE[kind](model))
    segments, batch = row_of_documents()
    chunks = count_chunks(monkeypatch)
    sizes, plain = [], packed_head._logits
    monkeypatch.setattr(
        packed_head, "_logits", lambda h, *rest: sizes.append(len(h)) or plain(h, *rest)
    )
    found = scores_ahead(model, batch, segments, with_base=True)
    total = sum(len(scores.logps) for scores in (found.base, *found.heads))
    assert max(sizes) <= 2
    assert len(chunks) >= total / 2


def test_medusa_starts_as_the_lm_head_and_a_module_as_the_last_layer_once_more():
    model = prepared()
    _, batch = row_of_documents()
    logits = model(batch.input_ids[:, :5]).logits[0, -1]
    medusa = MAKE["medusa"](model)
    states = model.model(batch.input_ids[:, :5]).last_hidden_state[:, -1]
    for drafted in StackedHeads(medusa)(states):
        torch.testing.assert_close(drafted[0], logits, **CLOSE)
    (module,) = MTPModules.on(model, num_modules=1).layers
    last = dict(model.model.layers[-1].named_parameters())
    for name, weight in module.block.named_parameters():
        torch.testing.assert_close(weight, last[name], rtol=0, atol=0)
        assert weight.data_ptr() != last[name].data_ptr()


def test_medusa_also_stands_on_a_model_by_rows_and_modules_are_refused():
    segments, batch = row_of_documents()
    found = []
    for by_rows in (False, True):
        model = prepared()
        if by_rows:
            model.set_attn_implementation("sdpa")
            compute_rows(model, padded=True)
        add_heads(model, stir(MAKE["medusa"](model)))
        found.append(scores_ahead(model, batch, segments, with_base=True))
    for ours, theirs in zip(*([f.base, *f.heads] for f in found), strict=True):
        torch.testing.assert_close(ours.logps, theirs.logps, **CLOSE)
    with pytest.raises(ConfigError, match="prediction modules need packed attention"):
        add_heads(model, MAKE["mtp"](model))
