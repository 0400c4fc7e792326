"""What every trainer promises: how a batch is cut changes nothing, and nothing bad goes unseen."""

import pytest
import torch
from transformers import TrainerCallback

from posttrain.errors import ConfigError, DataError
from posttrain.packed.forward import tokens_at_once
from posttrain.trainers import base, preference
from posttrain.trainers.base import Metrics, NonFiniteLossError
from tests.conftest import make_model, make_tokenizer
from tests.trainers import tiny
from tests.trainers.tiny import BATCH, KINDS, STEPS, logged, make_trainer, weights

# Packed tokens a micro-batch: enough for the longest example, far less than a batch.
SMALL = 64
DATA = [("sft", "documents"), ("dpo", "pairs"), ("rl", "prompts")]


def trained(kind, folder, **settings):
    trainer = make_trainer(kind, folder, **settings)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole_batches(tmp_path_factory):
    """Each kind trained with one micro-batch a step: what every other way of cutting must give."""
    folder = tmp_path_factory.mktemp("whole")
    return {kind: trained(kind, folder) for kind in KINDS}


def assert_same_run(trainer, expected):
    assert (weights(trainer.model) - weights(expected.model)).abs().max() < 1e-6
    assert logged(trainer, "loss") == pytest.approx(logged(expected, "loss"), abs=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_weights_by_far_more_than_the_tolerance(kind, whole_batches):
    moved = weights(whole_batches[kind].model) - weights(make_model())
    assert moved.abs().max() > 1e-3
    assert len(logged(whole_batches[kind], "loss")) == STEPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_steps_change_nothing(kind, parts, whole_batches, tmp_path):
    trainer = trained(
        kind,
        tmp_path,
        per_device_train_batch_size=BATCH[kind] // parts,
        gradient_accumulation_steps=parts,
    )
    assert_same_run(trainer, whole_batches[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_small_microbatches_change_nothing(kind, whole_batches, tmp_path):
    trainer = trained(kind, tmp_path, trainer={"max_tokens_per_microbatch": SMALL})
    assert_same_run(trainer, whole_batches[kind])


def test_a_cpu_takes_fewer_tokens_at_once():
    assert [tokens_at_once(torch.device(kind)) for kind in ("cpu", "cuda")] == [2048, 16384]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing_with_tied_embeddings(kind, tmp_path):
    plain, checkpointed = (
        trained(
            kind,
            tmp_path,
            model=make_model("qwen3", tie_word_embeddings=True),
            activation_checkpointing=checkpointing,
        )
        for checkpointing in (False, True)
    )
    assert checkpointed.model.is_activation_checkpointing
    assert checkpointed.model.lm_head.weight is checkpointed.model.model.embed_tokens.weight
    assert torch.equal(weights(checkpointed.model), weights(plain.model))


def break_loss(trainer, *, at_step):
    """From `at_step` on the loss is NaN."""
    original = trainer.microbatch_loss

    def broken(model, examples):
        loss = original(model, examples)
        return loss * float("nan") if trainer.state.global_step + 1 >= at_step else loss

    trainer.microbatch_loss = broken


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path)
    break_loss(trainer, at_step=2)
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 2 \(nan on rank 0\)"):
        trainer.train()
    assert trainer.state.global_step == 1
    one_step = trained(kind, tmp_path, max_steps=1)
    # Not to the bit: one step of DPO sees, and scores by the reference, a part of the pairs alone.
    torch.testing.assert_close(weights(trainer.model), weights(one_step.model))


def test_a_gradient_that_is_not_finite_under_a_finite_loss_stops_the_run(tmp_path):
    """Clipping by a norm of NaN would make every weight NaN."""
    trainer = make_trainer("sft", tmp_path)
    before = weights(trainer.model).clone()
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteLossError, match="gradient's norm is nan at step 1"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


def test_one_bad_row_in_an_early_accumulation_step_stops_the_run(tmp_path):
    trainer = make_trainer(
        "sft", tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    original, calls = trainer.microbatch_loss, []

    def broken(model, examples):
        calls.append(1)
        return original(model, examples) * (float("inf") if len(calls) == 1 else 1.0)

    trainer.microbatch_loss = broken
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 1 \(inf on rank 0\)"):
        trainer.train()
    assert len(calls) == 2
    assert torch.equal(weights(trainer.model), weights(make_model()))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_step_makes_the_host_read_one_tensor_before_the_optimizer_steps(
    kind, tmp_path, monkeypatch
):
    """The finite check of loss and gradient; everything else stays on the device."""
    reads, counting = [], []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "numpy"):
        plain = getattr(torch.Tensor, name)

        def read(tensor, *args, name=name, plain=plain):
            if counting:
                reads.append(name)
            return plain(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, read)

    class StopCounting(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            counting.clear()

    trainer = make_trainer(kind, tmp_path, trainer={"callbacks": [StopCounting()]})
    step = trainer.training_step
    trainer.training_step = lambda *args: (counting.append(1), step(*args))[1]
    trainer.train()
    assert reads == ["tolist"] * STEPS


def test_the_first_speed_counts_from_the_first_step_and_not_from_the_reference_pass(
    tmp_path, monkeypatch
):
    """A clock that jumps by 1,000 seconds in the reference pass, and by 2 in every step."""
    clock = [0.0]
    monkeypatch.setattr(base.time, "perf_counter", lambda: clock[0])
    scored = preference.compute_reference

    def slow_reference(*args, **settings):
        clock[0] += 1000
        return scored(*args, **settings)

    monkeypatch.setattr(preference, "compute_reference", slow_reference)

    class TwoSeconds(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock[0] += 2

    trainer = make_trainer("dpo", tmp_path, trainer={"callbacks": [TwoSeconds()]})
    tokens = []
    step = trainer.training_step

    def counted_step(model, inputs, num_items):
        tokens.append(sum(map(trainer.num_tokens, inputs)))
        return step(model, inputs, num_items)

    trainer.training_step = counted_step
    trainer.train()
    expected = [count / 2 for count in tokens]
    assert logged(trainer, "tokens_per_second") == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_trainable_parameters_is_refused(kind, tmp_path):
    with pytest.raises(ConfigError, match="no trainable parameter"):
        make_trainer(kind, tmp_path, model=make_model().requires_grad_(False))


@pytest.mark.parametrize(("kind", "what"), DATA)
def test_empty_data_is_refused(kind, what, tmp_path):
    from datasets import Dataset

    with pytest.raises(DataError, match=f"at least one {what[:-1]} to train on"):
        make_trainer(kind, tmp_path, trainer={what: Dataset.from_list([])})


def test_evaluating_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected an evaluation set"):
        make_trainer("sft", tmp_path).evaluate()


@pytest.mark.parametrize(("kind", "what"), DATA)
def test_evaluating_before_and_during_training_changes_nothing(kind, what, whole_batches, tmp_path):
    held_out = getattr(tiny, what)(5, seed=9)
    trainer = make_trainer(
        kind,
        tmp_path,
        trainer={f"eval_{what}": held_out},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert_same_run(trainer, whole_batches[kind])
    name = "eval_reward" if kind == "rl" else "eval_loss"
    assert len(logged(trainer, name)) == STEPS + 1  # the first one is logged to an earlier state


def test_evaluation_loss_does_not_depend_on_the_evaluation_batch(tmp_path):
    held_out = tiny.documents(7, seed=9)
    losses = [
        make_trainer(
            "sft", tmp_path, trainer={"eval_documents": held_out}, per_device_eval_batch_size=size
        ).evaluate()["eval_loss"]
        for size in (1, 3, 8)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_metrics_are_means_over_everything_since_the_last_line():
    """(1 + 2 + 9) / (1 + 3) = 3; the next line starts from nothing."""
    metrics = Metrics()
    metrics.add("length", 1.0)
    metrics.add("length", torch.tensor(11.0), 3)
    metrics.add("never", torch.tensor(0.0), 0)
    reduced = metrics.reduce()
    assert reduced["length"] == 3.0
    assert reduced["never"] != reduced["never"]  # NaN, not a division by zero
    assert metrics.reduce() == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(value, tmp_path):
    """The loss of the last step was fine; what the step made of the weights was not."""

    class Breaks(TrainerCallback):
        def on_optimizer_step(self, _args, state, _control, model=None, **_):
            if state.global_step == 2:
                model.model.layers[0].mlp.up_proj.weight.data[0, 0] = value

    trainer = make_trainer(
        "sft", tmp_path, save_strategy="steps", save_steps=1, trainer={"callbacks": [Breaks()]}
    )
    with pytest.raises(NonFiniteLossError, match=r"after step 3, model\.layers\.0\.mlp\.up_proj"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path):
    larger = make_tokenizer()
    larger.add_tokens(["new"])
    with pytest.raises(ConfigError, match=r"98 tokens, and the model's embedding 97 rows .*'new'"):
        make_trainer("sft", tmp_path, trainer={"tokenizer": larger})


def test_building_a_trainer_makes_no_folder(tmp_path):
    make_trainer("sft", tmp_path / "a" / "checkpoints")
    assert list(tmp_path.iterdir()) == []
