"""PreferenceTrainer: the reference is computed once and kept, and the losses get what they name."""

import itertools
import math
from functools import partial

import pytest
import torch
from datasets import Dataset

from posttrain.errors import ConfigError, DataError
from posttrain.losses import dpo_length_norm_loss, dpo_loss, simpo_loss
from posttrain.run.options import bind
from posttrain.trainers import preference
from posttrain.trainers.known_reference import load_reference, refuse_unscored
from posttrain.trainers.preference import (
    FILE_NAME,
    compute_reference,
    row_tokens,
)
from tests.conftest import make_model
from tests.trainers.tiny import PAIRS_PER_STEP, logged, make_trainer, pairs, weights


def answer_logp(model, prompt, completion):
    """Summed log-prob of a completion by an ordinary forward."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).sum().item()


def test_the_first_dpo_loss_is_log_two_and_the_next_is_not(tmp_path):
    trainer = make_trainer("dpo", tmp_path)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[1] - math.log(2)) > 1e-4
    assert logged(trainer, "margin")[0] == pytest.approx(0, abs=1e-4)


def test_the_reference_is_the_starting_model_scored_once_before_step_0(tmp_path, monkeypatch):
    calls = []
    original = preference.compute_reference
    monkeypatch.setattr(
        preference, "compute_reference", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    data = pairs()
    trainer = make_trainer("dpo", tmp_path, trainer={"pairs": data, "eval_pairs": data})
    trainer.train()
    assert len(calls) == 2  # training and evaluation pairs
    model = make_model()
    for index in (0, 11, 23):
        row = data[index]
        expected = [answer_logp(model, row["prompt_ids"], row[f"{which}_ids"])
                    for which in ("chosen", "rejected")]  # fmt: skip
        assert trainer.train_dataset.reference[index].tolist() == pytest.approx(expected, rel=1e-5)
    saved = load_reference(tmp_path / FILE_NAME, data)
    assert torch.equal(saved, trainer.train_dataset.reference)


def reference_forwards(monkeypatch):
    """Packed tokens of each forward of the reference pass, as a list that grows."""
    sizes, plain = [], preference.packed_logps

    def counted(model, batch):
        if not model.training:
            sizes.append(batch.input_ids.numel())
        return plain(model, batch)

    monkeypatch.setattr(preference, "packed_logps", counted)
    return sizes


def test_the_reference_forward_keeps_within_the_microbatch(tmp_path, monkeypatch):
    """64 tokens at a time or all 24 pairs at once: the same numbers."""
    sizes = reference_forwards(monkeypatch)
    small = make_trainer("dpo", tmp_path, max_steps=2, trainer={"max_tokens_per_microbatch": 64})
    small.train()
    assert max(sizes) <= 64
    whole = make_trainer("dpo", tmp_path, max_steps=2)
    whole.train()
    found = small.train_dataset.reference, whole.train_dataset.reference
    torch.testing.assert_close(*found, equal_nan=True)  # pairs that no step sees


def test_the_reference_pass_fills_the_microbatch_whatever_the_training_batch(tmp_path, monkeypatch):
    sizes = reference_forwards(monkeypatch)
    trainer = make_trainer("dpo", tmp_path, max_steps=24, per_device_train_batch_size=1)
    trainer.train()
    assert sizes == [sum(map(row_tokens, pairs()))]


def test_the_reference_pass_scores_pairs_of_like_length_together_and_each_once():
    data, seen = pairs(), []

    def score(examples):
        seen.append([row_tokens(pair) for pair in examples])
        return torch.tensor([[len(p["chosen_ids"]), len(p["rejected_ids"])] for p in examples])

    logps = compute_reference(score, data, max_tokens=100, device=torch.device("cpu"))
    expected = [[len(pair["chosen_ids"]), len(pair["rejected_ids"])] for pair in data]
    assert logps.tolist() == expected
    flat = [size for part in seen for size in part]
    assert flat == sorted(map(row_tokens, data), reverse=True)
    for part, following in itertools.pairwise(seen):
        assert sum(part) <= 100 < sum(part) + following[0]


def test_a_loss_without_reference_never_computes_one(tmp_path, monkeypatch):
    monkeypatch.setattr(preference, "compute_reference", lambda *_, **__: pytest.fail("computed"))
    trainer = make_trainer("dpo", tmp_path, trainer={"loss": simpo_loss, "eval_pairs": pairs(4)})
    assert not trainer.needs_reference
    trainer.train()
    trainer.evaluate()
    assert not (tmp_path / FILE_NAME).exists()
    assert logged(trainer, "chosen_log_ratio") == []


def test_a_loss_gets_lengths_and_log_probs_of_the_right_pairs(tmp_path):
    seen = []

    def spy(chosen, rejected, chosen_lengths, rejected_lengths):
        seen.append((chosen, rejected, chosen_lengths, rejected_lengths))
        return chosen - rejected

    data = pairs(PAIRS_PER_STEP)
    trainer = make_trainer("dpo", tmp_path, trainer={"pairs": data, "loss": spy}, max_steps=1)
    assert not trainer.needs_reference
    rows = [data[i] for i in range(PAIRS_PER_STEP)]
    trainer.microbatch_loss(trainer.model.eval(), rows)
    chosen, rejected, chosen_lengths, rejected_lengths = seen[0]
    assert chosen_lengths.tolist() == [len(row["chosen_ids"]) for row in rows]
    assert rejected_lengths.tolist() == [len(row["rejected_ids"]) for row in rows]
    expected = [answer_logp(trainer.model, row["prompt_ids"], row["rejected_ids"]) for row in rows]
    assert rejected.tolist() == pytest.approx(expected, rel=1e-5)
    assert chosen.requires_grad


def test_length_normalised_dpo_runs_and_differs_from_dpo(tmp_path):
    trainers = [
        make_trainer("dpo", tmp_path, trainer={"loss": loss})
        for loss in (bind(dpo_loss, beta=0.1), bind(dpo_length_norm_loss, beta=0.1))
    ]
    for trainer in trainers:
        trainer.train()
    assert trainers[1].needs_reference
    assert not torch.allclose(weights(trainers[0].model), weights(trainers[1].model), atol=1e-4)


def test_it_learns_which_completions_are_chosen(tmp_path):
    data = pairs(16)
    trainer = make_trainer(
        "dpo", tmp_path, trainer={"pairs": data, "eval_pairs": data}, max_steps=12,
        per_device_train_batch_size=16,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_pair_accuracy"] > 0.95
    assert logged(trainer, "loss")[-1] < 0.5 * math.log(2)


def test_held_out_pairs_can_be_evaluated_before_training_but_not_made_up_after_it(tmp_path):
    trainer = make_trainer("dpo", tmp_path, trainer={"eval_pairs": pairs(4, seed=1)})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    assert abs(trainer.evaluate()["eval_loss"] - math.log(2)) > 1e-4
    with pytest.raises(DataError, match="no longer the reference"):
        trainer.evaluate(pairs(4, seed=2))


def test_a_reference_made_for_other_data_is_refused(tmp_path):
    trainer = make_trainer("dpo", tmp_path)
    trainer.train()
    data = pairs().to_list()
    assert len(load_reference(tmp_path / FILE_NAME, Dataset.from_list(data))) == len(data)
    data[5]["chosen_ids"][0] += 1
    with pytest.raises(DataError, match="made for other data"):
        load_reference(tmp_path / FILE_NAME, Dataset.from_list(data))
    with pytest.raises(DataError, match="made for other data"):
        load_reference(tmp_path / FILE_NAME, Dataset.from_list(data[::-1]))


def test_a_missing_reference_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="without --resume"):
        load_reference(tmp_path / FILE_NAME, pairs(2))


@pytest.mark.parametrize(
    "loss",
    [
        lambda chosen, rejected, weights: chosen - rejected + weights,
        lambda chosen, ref_chosen: chosen - ref_chosen,
        lambda policy, reference: policy - reference,
    ],
)
def test_a_loss_that_asks_for_what_nobody_has_is_refused_before_training(loss, tmp_path):
    with pytest.raises(ConfigError, match="expected arguments among chosen, rejected"):
        make_trainer("dpo", tmp_path, trainer={"loss": loss})


def test_binding_a_setting_that_a_loss_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="--label_smoothing: dpo_loss has no such setting"):
        bind(dpo_loss, label_smoothing=0.1)
    assert isinstance(bind(dpo_loss, beta=None), partial)


def test_only_the_pairs_that_the_steps_see_are_scored(tmp_path, capsys):
    """The order is the sampler's; a pair that was seen unscored would stop the run with NaN."""
    trainer = make_trainer("dpo", tmp_path, trainer={"pairs": pairs(64)})
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(weights(trainer.model), before)
    num_seen = trainer.state.max_steps * trainer.args.train_batch_size
    num_seen *= trainer.args.gradient_accumulation_steps
    known = trainer.train_dataset.reference.isfinite().all(1)
    assert known.sum() == num_seen < 64
    assert f"of {num_seen} of 64 rows" in capsys.readouterr().out
    path = tmp_path / FILE_NAME
    rows = known.nonzero().flatten().tolist()
    logps = load_reference(path, trainer.train_dataset)
    assert logps.shape == (64, 2)
    refuse_unscored(path, logps, rows)
    with pytest.raises(DataError, match="rows that the run was to see"):
        refuse_unscored(path, logps, None)


def test_a_second_run_that_sees_other_pairs_is_refused_before_a_step(tmp_path):
    """The model has moved: scored by it, those pairs would have another reference."""
    trainer = make_trainer("dpo", tmp_path, trainer={"pairs": pairs(64)})
    trainer.train()
    known, after = trainer.train_dataset.reference.clone(), weights(trainer.model)
    trainer.args.max_steps = 8
    with pytest.raises(DataError, match=r"rows that the run was to see.*start a new run"):
        trainer.train()
    assert torch.equal(weights(trainer.model), after)
    trainer.args.max_steps = 3
    trainer.train()  # the same pairs again
    assert not torch.equal(weights(trainer.model), after)
    assert torch.equal(trainer.train_dataset.reference.nan_to_num(), known.nan_to_num())
