"""HeadsTrainer: what moves and what does not, whatever the cut, and resumed runs."""

from functools import partial

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.heads import heads_of, scores_ahead, without_heads
from posttrain.losses import medusa1_loss, medusa2_loss, mtp_loss, parallel_heads_loss
from posttrain.models.lora import with_lora
from posttrain.packed.batch import Segment, pack
from posttrain.packed.prepare import prepare
from posttrain.run.settings import ModelConfig
from posttrain.trainers.heads import HeadsTrainer, Joint, beside_nll
from tests.conftest import make_model, make_tokenizer
from tests.heads.common import MAKE
from tests.trainers.tiny import BATCH, arguments, documents, logged, weights

ALONE = {"medusa": medusa1_loss, "mtp": mtp_loss, "parallel": parallel_heads_loss}
TOGETHER = {
    "medusa": Joint(medusa2_loss),
    "mtp": Joint(partial(beside_nll, loss=mtp_loss)),
    "parallel": Joint(partial(beside_nll, loss=parallel_heads_loss)),
}


def adapted(model):
    settings = {"use_peft": True, "lora_target_modules": ["q_proj", "down_proj"]}
    return with_lora(model, ModelConfig(model_name_or_path="", **settings))


def trainer_of(kind, objective, folder, *, lora=False, settings=None, **args):
    model = make_model(num_hidden_layers=2)
    prepare(model)
    model = adapted(model) if lora else model
    args = arguments(folder, **{"per_device_train_batch_size": BATCH["sft"], **args})
    return HeadsTrainer(
        model,
        args,
        MAKE[kind](model),
        objective,
        documents=documents(),
        tokenizer=make_tokenizer(),
        **(settings or {}),
    )


def of_model(trainer):
    with without_heads(trainer.model):
        return weights(trainer.model)


def of_heads(trainer):
    return weights(heads_of(trainer.model))


@pytest.mark.parametrize("kind", ALONE)
def test_heads_alone_leave_their_model_as_it_was_to_the_bit(kind, tmp_path):
    trainer = trainer_of(kind, ALONE[kind], tmp_path)
    before, heads = of_model(trainer), of_heads(trainer)
    trainer.train()
    assert torch.equal(of_model(trainer), before)
    assert not torch.equal(of_heads(trainer), heads)


@pytest.mark.parametrize("kind", TOGETHER)
def test_a_joint_run_moves_both_and_is_the_same_however_its_batch_is_cut(kind, tmp_path):
    found = []
    for limit, size, steps in ((None, 8, 1), (40, 4, 2)):
        trainer = trainer_of(
            kind,
            TOGETHER[kind],
            tmp_path,
            settings={"max_tokens_per_microbatch": limit},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        before = of_model(trainer)
        trainer.train()
        assert not torch.equal(of_model(trainer), before)
        found.append((of_model(trainer), of_heads(trainer), logged(trainer, "loss")))
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-4)


def test_the_logged_loss_is_the_formula_over_the_whole_batch(tmp_path):
    args = {"max_steps": 1, "learning_rate": 1e-9, "per_device_train_batch_size": 24}
    limit = {"max_tokens_per_microbatch": 90}
    trainer = trainer_of("medusa", Joint(medusa2_loss), tmp_path, settings=limit, **args)
    trainer.train()
    segments = [
        Segment(row["input_ids"], scored=row["trained"], row=i)
        for i, row in enumerate(trainer.train_dataset)
    ]
    batch = pack(segments, num_rows=len(segments), device="cpu")
    scores = scores_ahead(trainer.model, batch, segments, with_base=True)
    expected = medusa2_loss(scores.base.logps, [x.logps for x in scores.heads])
    assert logged(trainer, "loss") == pytest.approx([expected.item()], abs=1e-4)
    accuracy = scores.heads[0].is_argmax.mean().item()
    assert logged(trainer, "accuracy_ahead_2") == pytest.approx([accuracy])


def test_the_model_rests_while_the_heads_warm_up_and_moves_after(tmp_path):
    objective = Joint(medusa2_loss, medusa1_loss, warmup_steps=2)
    moved = []
    for steps in (2, 3):
        trainer = trainer_of("medusa", objective, tmp_path, max_steps=steps)
        before = of_model(trainer)
        trainer.train()
        moved.append(not torch.equal(of_model(trainer), before))
        states = trainer.optimizer.state
        counts = [states[w]["step"].item() for w in trainer.model_weights() if w in states]
        assert set(counts) <= {1.0}  # Adam counts from the first step in which the model moves
    assert moved == [False, True]


def test_heads_have_a_rate_of_their_own(tmp_path):
    settings = {"head_learning_rate": 4e-2}
    trainer = trainer_of("medusa", Joint(medusa2_loss), tmp_path, settings=settings)
    trainer.create_optimizer()
    theirs = {id(weight) for weight in heads_of(trainer.model).parameters()}
    for group in trainer.optimizer.param_groups:
        for weight in group["params"]:
            assert group["lr"] == (4e-2 if id(weight) in theirs else 1e-2)


def test_frozen_modules_are_kept_as_they_are_beside_a_model_that_trains(tmp_path):
    trainer = trainer_of("mtp", Joint(partial(beside_nll, loss=mtp_loss)), tmp_path)
    heads_of(trainer.model).requires_grad_(False)
    heads, model = of_heads(trainer), of_model(trainer)
    trainer.train()
    assert torch.equal(of_heads(trainer), heads)
    assert not torch.equal(of_model(trainer), model)


@pytest.mark.parametrize("kind", TOGETHER)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(kind, tmp_path):
    whole = trainer_of(kind, TOGETHER[kind], tmp_path / "whole", max_steps=4)
    whole.train()
    first = trainer_of(
        kind, TOGETHER[kind], tmp_path / "cut", max_steps=4, save_strategy="steps", save_steps=2
    )
    first.train()
    again = trainer_of(kind, TOGETHER[kind], tmp_path / "cut", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert torch.equal(of_model(again), of_model(whole))
    assert torch.equal(of_heads(again), of_heads(whole))


def test_with_an_adapter_switched_off_the_teacher_is_the_model_as_it_was(tmp_path):
    objective = Joint(medusa2_loss, distil=True)
    trainer = trainer_of("medusa", objective, tmp_path, lora=True, max_steps=4)
    trainer.train()
    first, *_, last = logged(trainer, "teacher_kl")
    assert first == pytest.approx(0, abs=1e-6)  # the adapter starts at 0
    assert last > 1e-6
    assert logged(trainer, "teacher_agreement")[0] == 1
    trainer.save_model(str(tmp_path / "model"))
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"adapter_model.safetensors", "heads"} <= names


def test_the_kl_in_chunks_is_the_plain_one_with_its_gradient(monkeypatch):
    from posttrain.heads import distill, tokens_ahead
    from posttrain.losses import self_distillation_kl

    model = make_model()
    prepare(model)
    segment = Segment(list(range(2, 12)), scored=[False] * 3 + [True] * 7)
    (ahead,) = tokens_ahead([segment], (1,), device="cpu")
    states, teacher = torch.randn(2, 1, 10, 32).requires_grad_().unbind(0)
    monkeypatch.setattr(distill, "CHUNK_ENTRIES", 3 * 97)
    found = -distill.chunked_kl(model.lm_head, states, teacher, ahead)[0, :, 0]
    logits = [x[:, ahead.positions] @ model.lm_head.weight.T for x in (states, teacher)]
    expected = self_distillation_kl(*logits, torch.ones(1, 7))[0]
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(x.sum(), states)[0] for x in (found, expected)]
    torch.testing.assert_close(*slopes)


def test_distillation_without_an_adapter_has_no_teacher(tmp_path):
    with pytest.raises(ConfigError, match="expected --use_peft"):
        trainer_of("medusa", Joint(medusa2_loss, distil=True), tmp_path)


def test_evaluation_is_a_mean_over_the_targets_of_the_whole_set(tmp_path):
    found = []
    for size in (3, 24):
        trainer = trainer_of(
            "mtp",
            TOGETHER["mtp"],
            tmp_path,
            settings={"eval_documents": documents(seed=3)},
            per_device_eval_batch_size=size,
        )
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
