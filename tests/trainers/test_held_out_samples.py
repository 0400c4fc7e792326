"""Samples of held-out rows: what the model completes, and how much likelier a pair has become."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import TrainerControl, TrainerState

from posttrain.packed.prepare import prepare_once
from posttrain.trainers.held_out_samples import HeldOutSamples
from tests.conftest import make_model, make_tokenizer

PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12]},
    {"prompt_ids": [6, 7], "chosen_ids": [9], "rejected_ids": [5, 5]},
]


def plain_logps(model, prompt: list[int], completion: list[int]) -> list[float]:
    """Log-probs of a completion's tokens by transformers' own forward."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]


def evaluate(callback: HeldOutSamples, model, step: int) -> list[dict]:
    state = TrainerState(global_step=step, is_world_process_zero=True)
    callback.on_evaluate(None, state, TrainerControl(), model=model)
    return [json.loads(line) for line in callback.path.read_text().splitlines()]


def scored(records: list[dict]) -> list[dict]:
    """Those of pairs, without the model's own completions."""
    return [record for record in records if record["chosen"] != "held out"]


def test_a_pair_shows_its_log_probs_and_how_far_they_moved(tmp_path):
    plain, model = make_model().eval(), make_model().eval()
    prepare_once(model, half=False)
    callback = HeldOutSamples(Dataset.from_list(PAIRS), make_tokenizer(), tmp_path)
    first = evaluate(callback, model, 0)
    assert [record["chosen"] for record in first] == [
        "held out", "chosen", "rejected", "held out", "chosen", "rejected"
    ]  # fmt: skip
    sides = [(pair, side) for pair in PAIRS for side in ("chosen", "rejected")]
    before = [plain_logps(plain, p["prompt_ids"], p[f"{s}_ids"]) for p, s in sides]
    for record, logps in zip(scored(first), before, strict=True):
        assert record["log_ratio"] == 0
        assert [token[1] for token in record["token_logps"]] == pytest.approx(logps, abs=1e-3)
    with torch.no_grad():
        for weights in (plain, model):
            weights.get_output_embeddings().weight.mul_(1.5)
    later = evaluate(callback, model, 4)[6:]
    for record, (pair, side), logps in zip(scored(later), sides, before, strict=True):
        after = sum(plain_logps(plain, pair["prompt_ids"], pair[f"{side}_ids"]))
        assert record["log_ratio"] == pytest.approx(after - sum(logps), abs=1e-3)
        assert record["log_ratio"] != 0


def test_a_document_shows_the_models_own_greedy_completion_of_its_prompt(tmp_path):
    model = make_model().eval()
    prepare_once(model, half=False)
    rows = [{"input_ids": [5, 6, 7, 8], "trained": [False, False, True, True]}] * 9
    found = evaluate(HeldOutSamples(Dataset.from_list(rows), make_tokenizer(), tmp_path), model, 0)
    assert len(found) == 4  # of nine rows
    with torch.no_grad():
        likeliest = make_model().eval()(torch.tensor([[5, 6]])).logits[0, -1].argmax().item()
    assert {record["prompt"] for record in found} == {make_tokenizer().decode([5, 6])}
    first = found[0]["token_logps"][0]
    assert first[0] == make_tokenizer().decode([likeliest])
    (logp,) = plain_logps(make_model().eval(), [5, 6], [likeliest])
    assert first[1] == pytest.approx(logp, abs=1e-3)


def test_a_document_that_is_trained_from_its_first_token_has_no_prompt_to_complete(tmp_path):
    rows = Dataset.from_list([{"input_ids": [5, 6], "trained": [True, True]}])
    assert HeldOutSamples(rows, make_tokenizer(), tmp_path).rows == []
