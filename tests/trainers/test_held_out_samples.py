"""Samples of held-out rows: what the model completes, how much likelier a pair has become, and how
a reward model scores it."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from posttrain.run.folder import read_log
from posttrain.trainers.fit import fit, training_arguments
from posttrain.trainers.held_out_samples import HeldOutSamples, HeldOutScores
from posttrain.trainers.reward import RewardTrainer
from tests.conftest import make_model, make_tokenizer
from tests.trainers import tiny
from tests.trainers.tiny import TRAINERS, Config, make_trainer

PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12]},
    {"prompt_ids": [6, 7], "chosen_ids": [9], "rejected_ids": [5, 5]},
]
SIDES = ("chosen", "rejected")


def plain_logps(model, prompt: list[int], completion: list[int]) -> list[float]:
    """Log-probs of a completion's tokens by transformers' own forward."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]


def held_out(kind, folder, rows):
    """A trainer with these held-out rows, and the callback that shows them."""
    name = {"sft": "eval_documents", "dpo": "eval_pairs"}[kind]
    trainer = make_trainer(kind, folder, trainer={name: Dataset.from_list(rows)})
    trainer.model.eval()
    return trainer, HeldOutSamples(trainer, folder)


def evaluate(trainer, callback, step: int) -> list[dict]:
    trainer.state.global_step = step
    callback.on_evaluate(trainer.args, trainer.state, trainer.control)
    return read_log(callback.folder / "samples.jsonl")


def scored(records: list[dict]) -> list[dict]:
    """Those of pairs, without the model's own completions."""
    return [record for record in records if record["chosen"] != "held out"]


def test_a_pair_shows_its_log_probs_and_how_far_they_moved(tmp_path):
    plain = make_model().eval()
    trainer, callback = held_out("dpo", tmp_path, PAIRS)
    first = evaluate(trainer, callback, 0)
    assert [record["chosen"] for record in first] == ["held out", *SIDES, "held out", *SIDES]
    sides = [(pair, side) for pair in PAIRS for side in SIDES]
    before = [plain_logps(plain, p["prompt_ids"], p[f"{s}_ids"]) for p, s in sides]
    for record, logps in zip(scored(first), before, strict=True):
        assert record["log_ratio"] == 0
        assert [token[1] for token in record["token_logps"]] == pytest.approx(logps, abs=1e-3)
    with torch.no_grad():
        for weights in (plain, trainer.model):
            weights.get_output_embeddings().weight.mul_(1.5)
    later = evaluate(trainer, callback, 4)[6:]
    for record, (pair, side), logps in zip(scored(later), sides, before, strict=True):
        after = sum(plain_logps(plain, pair["prompt_ids"], pair[f"{side}_ids"]))
        assert record["log_ratio"] == pytest.approx(after - sum(logps), abs=1e-3)
        assert record["log_ratio"] != 0


def test_a_document_shows_the_models_own_greedy_completion_of_its_prompt(tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8], "trained": [False, False, True, True]}] * 9
    found = evaluate(*held_out("sft", tmp_path, rows), 0)
    assert len(found) == 4  # of nine rows
    with torch.no_grad():
        likeliest = make_model().eval()(torch.tensor([[5, 6]])).logits[0, -1].argmax().item()
    assert {record["prompt"] for record in found} == {make_tokenizer().decode([5, 6])}
    first = found[0]["token_logps"][0]
    assert first[0] == make_tokenizer().decode([likeliest])
    (logp,) = plain_logps(make_model().eval(), [5, 6], [likeliest])
    assert first[1] == pytest.approx(logp, abs=1e-3)


def test_a_document_that_is_trained_from_its_first_token_has_no_prompt_to_complete(tmp_path):
    _, callback = held_out("sft", tmp_path, [{"input_ids": [5, 6], "trained": [True, True]}])
    assert callback.rows == []


@dataclass(kw_only=True)
class Evaluated(Config):
    eval_dataset: str | None = "tiny"


def run(folder, **settings):
    """A DPO run that is evaluated and saved after every second of four steps."""
    config = Evaluated(
        output_dir=str(folder), per_device_train_batch_size=8, eval_steps=2, save_steps=2,
        **settings,
    )  # fmt: skip
    trainer = TRAINERS["dpo"](
        make_model(), training_arguments(config), eval_pairs=tiny.pairs(6, seed=9)
    )
    trainer.add_callback(HeldOutSamples(trainer, folder))
    fit(trainer, config)
    return [
        (r["step"], r["chosen"], r.get("log_ratio")) for r in read_log(folder / "samples.jsonl")
    ]


def test_a_resumed_run_compares_with_the_model_that_the_whole_run_began_with(tmp_path):
    """Also one that resumes before its first checkpoint, which is evaluated at its beginning."""
    whole = run(tmp_path / "whole")
    assert {step for step, _, _ in whole} == {0, 2, 4}
    moved = [ratio for step, side, ratio in whole if step == 4 and side in SIDES]
    assert len(moved) == 8
    assert all(moved)

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    shutil.rmtree(stopped / "model")
    (stopped / "checkpoints" / "checkpoint-4" / "manifest.json").unlink()
    assert run(stopped, resume=True) == whole

    (stopped / "checkpoints" / "checkpoint-2" / "manifest.json").unlink()
    shutil.rmtree(stopped / "model")
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-4")
    assert run(stopped, resume=True) == whole


def test_other_rows_are_not_compared_with_those_of_before(tmp_path):
    evaluate(*held_out("dpo", tmp_path, PAIRS), 0)
    found = evaluate(*held_out("dpo", tmp_path, PAIRS[::-1]), 4)[6:]
    assert len(scored(found)) == 4
    assert not any("log_ratio" in record for record in found)


@pytest.fixture
def reward(base, tmp_path):
    """A reward model's trainer with seven held-out pairs, and the callback that shows them."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    trainer = RewardTrainer(
        model.eval(), tiny.arguments(tmp_path), pairs=tiny.pairs(), tokenizer=make_tokenizer(),
        eval_pairs=tiny.pairs(7, seed=9), max_tokens_per_microbatch=64,
    )  # fmt: skip
    return trainer, HeldOutScores(trainer, tmp_path)


def margin_of(record: dict) -> float:
    return record["margin"]


def test_a_reward_model_shows_the_pairs_it_ranks_worst_and_best_with_their_scores(
    reward, base, tmp_path
):
    trainer, callback = reward
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).eval()
    plain.score.load_state_dict(trainer.model.score.state_dict())
    expected = {}
    for pair in tiny.pairs(7, seed=9):
        ids = [torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]]) for side in SIDES]
        with torch.no_grad():
            scores = [plain(one).logits[0, 0].item() for one in ids]
        expected[make_tokenizer().decode(pair["prompt_ids"])] = scores
    margins = sorted(chosen - rejected for chosen, rejected in expected.values())

    found = evaluate(trainer, callback, 0)
    assert [record["chosen"] for record in found] == [*SIDES] * (len(found) // 2)
    pairs = [record["pair"] for record in found[::2]]
    assert pairs[:3] == ["worst", "worst", "best"]
    assert 3 <= len(pairs) <= 5
    assert set(pairs[3:]) <= {"random"}
    for chosen, rejected in zip(found[::2], found[1::2], strict=True):
        scores = expected[chosen["prompt"]]
        assert [chosen["reward"], rejected["reward"]] == pytest.approx(scores, abs=1e-5)
        assert chosen["margin"] == rejected["margin"]
        assert chosen["margin"] == pytest.approx(scores[0] - scores[1], abs=1e-5)
        assert chosen["before"] == {"reward": chosen["reward"], "margin": chosen["margin"]}
    shown = [record["margin"] for record in found[:6:2]]
    assert shown == pytest.approx([margins[0], margins[1], margins[-1]], abs=1e-5)
    assert margins[0] < 0  # ranked wrongly

    with torch.no_grad():
        trainer.model.score.weight.mul_(-1)  # what was best is worst
    later = evaluate(trainer, callback, 4)[len(found) :]
    assert later[0]["prompt"] == found[4]["prompt"]
    assert later[0]["margin"] == pytest.approx(-margins[-1], abs=1e-5)
    assert later[0]["before"]["margin"] == pytest.approx(margins[-1], abs=1e-5)
    kept = json.loads((tmp_path / "held_out_before.json").read_text())["sums"]
    assert len(kept) == 7
