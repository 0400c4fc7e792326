"""UnpairedTrainer: what a batch shares is found over all of it, and losses see each completion."""

import json
import math
import random
import shutil
from functools import partial

import pytest
import torch
from datasets import Dataset

from posttrain.errors import ConfigError, DataError
from posttrain.losses import apo_zero_unpaired_loss, bco_unpaired_loss, kto_loss
from posttrain.models.load import load_model
from posttrain.trainers import unpaired
from posttrain.trainers.fit import fit, training_arguments
from posttrain.trainers.unpaired import (
    SHIFT_FILE,
    UnpairedTrainer,
    partners,
    siblings,
    weights_advice,
)
from tests.conftest import make_model, make_tokenizer, random_ids
from tests.trainers.tiny import Config, arguments, completions, logged, weights

LOSSES = {"kto": kto_loss, "bco": bco_unpaired_loss, "apo_zero": apo_zero_unpaired_loss}
# Nearly all completions are to become likelier, and so do mismatched ones: z0 is above its floor.
RISING = partial(kto_loss, weights=(1.0, 0.01))


def make_trainer(folder, *, model=None, loss=kto_loss, own=None, **changes):
    args = arguments(folder, **{"per_device_train_batch_size": 8, **changes})
    settings = {"completions": completions(), "tokenizer": make_tokenizer(), **(own or {})}
    return UnpairedTrainer(model or make_model(), args, loss=loss, **settings)


def plain_logp(model, prompt, completion):
    """Summed log-prob of a completion by an ordinary forward, with its gradient."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).sum()


def plain_ratio(model, reference, prompt, completion):
    with torch.no_grad():
        ref = plain_logp(reference, prompt, completion)
    return plain_logp(model, prompt, completion) - ref


def test_kto_s_loss_and_gradient_are_those_of_plain_forwards_over_the_whole_batch(tmp_path):
    """One micro-batch a completion, against Eq. 8 written out on unpacked sequences.

    The policy is not the reference, or z0 would be 0.
    """
    data, model, reference = completions(8), make_model(seed=3).double(), make_model().double()
    trainer = make_trainer(tmp_path, model=reference, own={"completions": data}, max_steps=1)
    rows = trainer.train_dataset
    trainer._find_reference(rows, trainer.model, resume=False)
    trainer.model.load_state_dict(model.state_dict())
    reference = make_model().double()
    trainer.max_tokens_per_microbatch = 1
    batch = [rows[i] for i in range(8)]
    (batch,), count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    trainer.accelerator.backward = lambda loss, **_: loss.backward()
    found = trainer.training_step(trainer.model, batch, count)

    others = [data[i] for i in partners(data["prompt_ids"])]
    kl = [plain_ratio(model, reference, row["prompt_ids"], other["completion_ids"]).item()
          for row, other in zip(data, others, strict=True)]  # fmt: skip
    z0 = max(0.0, sum(kl) / 8)
    assert trainer._point.item() == pytest.approx(z0, abs=1e-5)
    assert z0 > 0.1
    terms = []
    for row in data:
        surplus = 0.1 * (
            plain_ratio(model, reference, row["prompt_ids"], row["completion_ids"]) - z0
        )
        terms.append(1 - torch.sigmoid(surplus if row["label"] else -surplus))
    expected = torch.stack(terms).mean()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    for mine, plain in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", [RISING, *LOSSES.values()])
def test_cutting_a_batch_changes_nothing(loss, tmp_path):
    """Whole, in small micro-batches, and in four accumulation steps: the same weights."""
    ends = []
    cuts = ({}, {"own": {"max_tokens_per_microbatch": 20}},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})  # fmt: skip
    for cut in cuts:
        trainer = make_trainer(tmp_path, loss=loss, **cut)
        trainer.train()
        ends.append(weights(trainer.model))
    if loss is RISING:
        assert logged(trainer, "reference_point")[-1] > 0.5
    start = weights(make_model())
    assert (ends[0] - start).abs().max() > 1e-3
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-6, rtol=0)


def test_a_point_of_each_micro_batch_would_be_found(tmp_path, monkeypatch):
    """The control: a reference point that sees half of the batch ends elsewhere."""
    plain, half = (make_trainer(tmp_path, loss=RISING) for _ in range(2))
    plain.train()
    find = half._find_point
    monkeypatch.setattr(half, "_find_point", lambda batches: find([b[:4] for b in batches]))
    half.train()
    assert (weights(plain.model) - weights(half.model)).abs().max() > 1e-5


def test_partners_have_other_prompts_and_use_every_completion():
    """Pairs split in two: the neighbour of a row has the same prompt, and would be no mismatch."""
    prompts = [[i // 2, 7] for i in range(20)]
    found = partners(prompts)
    assert all(prompts[row] != prompts[other] for row, other in enumerate(found))
    assert sorted(found) == list(range(20))
    assert found == partners(prompts)
    many = [[1]] * 9 + [[2]]  # one prompt has nearly all completions
    assert partners(many) == [9] * 9 + [partners(many)[9]]
    assert partners(many)[9] < 9
    with pytest.raises(DataError, match="at least 2 prompts, found 1"):
        partners([[1], [1]])


def test_completions_of_one_prompt_are_packed_behind_it_once(tmp_path):
    rows = [
        {"prompt_ids": [5, 6, 7], "completion_ids": [n, 1], "label": n % 2} for n in range(2, 8)
    ]
    other = [{"prompt_ids": [9], "completion_ids": [8, 1], "label": 1}]
    trainer = make_trainer(tmp_path, own={"completions": Dataset.from_list(rows + other)})
    mixed = [rows[0], *other, *rows[1:]]
    assert [len(group) for group in siblings(mixed)] == [6, 1]
    assert [len(group) for group in siblings(mixed, most=8)] == [2, 1, 2, 2]
    sizes = []
    plain = unpaired.packed_logps
    try:
        unpaired.packed_logps = lambda model, batch: (
            sizes.append(batch.input_ids.numel()), plain(model, batch))[1]  # fmt: skip
        trainer._score(trainer.model, [trainer.train_dataset[i] for i in range(7)])
    finally:
        unpaired.packed_logps = plain
    assert sizes == [3 + 1 + 7 * 2 * 2]  # each prompt once; each completion and a mismatched one


def test_the_reference_of_both_completions_is_the_starting_model(tmp_path):
    data = completions(8)
    trainer = make_trainer(tmp_path, own={"completions": data}, max_steps=1)
    trainer.train()
    model, rows = make_model(), trainer.train_dataset
    for i in range(8):
        row = rows[i]
        expected = [plain_logp(model, row["prompt_ids"], row[name]).item()
                    for name in ("completion_ids", "mismatched_ids")]  # fmt: skip
        assert row["reference"] == pytest.approx(expected, rel=1e-5)


def test_bco_s_shift_is_the_mean_reward_of_all_earlier_steps(tmp_path):
    """At the first step 0, where rewards are 0 too; later what was seen, each completion once."""
    trainer = make_trainer(
        tmp_path, loss=partial(bco_unpaired_loss, beta=0.5), own={"max_tokens_per_microbatch": 20},
    )  # fmt: skip
    seen, shifts = [], []
    part_loss = trainer._part_loss

    def spy(model, part, examples):
        shifts.append(trainer.shift.mean.item())
        loss = part_loss(model, part, examples)
        seen.extend((0.5 * trainer._ratios).tolist() if part else [])
        return loss

    trainer._part_loss = spy
    trainer.train()
    trainer.shift.settle()
    assert len(seen) == 24
    assert shifts[0] == 0 != shifts[-1]
    assert shifts[-1] == pytest.approx(sum(seen[:16]) / 16, abs=1e-6)
    assert trainer.shift.mean.item() == pytest.approx(sum(seen) / 24, abs=1e-6)


def run(folder, loss, **settings):
    """`fit` as a recipe calls it, with save_steps 2."""
    config = Config(
        output_dir=str(folder), per_device_train_batch_size=8, **{"save_steps": 2, **settings}
    )
    trainer = UnpairedTrainer(
        make_model(), training_arguments(config), completions=completions(), loss=LOSSES[loss],
        tokenizer=make_tokenizer(),
    )  # fmt: skip
    fit(trainer, config)
    return trainer


def stopped_at_2(folder):
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_a_resumed_run_ends_with_the_same_weights(loss, tmp_path):
    """And BCO's would not, if its shift began anew."""
    whole = run(tmp_path / "run", loss)
    stopped_at_2(tmp_path / "run")
    resumed = run(tmp_path / "run", loss, resume=True)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")
    path = tmp_path / "run" / "checkpoints" / "checkpoint-2" / SHIFT_FILE
    assert path.is_file() == (loss == "bco")
    if loss == "bco":
        assert json.loads(path.read_text())["count"] == 16
        resumed.shift.load(path)
        assert resumed.shift.mean != 0


def test_bco_without_its_shift_is_not_resumed(tmp_path):
    with pytest.raises(DataError, match="needs its reward shift"):
        make_trainer(tmp_path, loss=bco_unpaired_loss).shift.load(tmp_path / SHIFT_FILE)


@pytest.mark.parametrize("loss", LOSSES)
def test_it_learns_which_completions_are_good(loss, tmp_path):
    data = completions(16)
    trainer = make_trainer(
        tmp_path, loss=LOSSES[loss], max_steps=12, per_device_train_batch_size=16,
        own={"completions": data, "eval_completions": data},
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_label_accuracy"] > 0.9
    assert found["eval_desirable_log_ratio"] > 1 > -1 > found["eval_undesirable_log_ratio"]
    first, last = logged(trainer, "loss")[0], logged(trainer, "loss")[-1]
    assert first == pytest.approx(math.log(2) if loss == "bco" else 0.5, abs=1e-5)
    assert last < 0.95 * first


def test_an_evaluation_moves_neither_the_shift_nor_the_next_step(tmp_path):
    data = completions(8, seed=5)
    ends = []
    for held_out in (None, data):
        changes = {"eval_strategy": "steps", "eval_steps": 1} if held_out else {}
        own = {"eval_completions": held_out}
        trainer = make_trainer(tmp_path, loss=bco_unpaired_loss, own=own, **changes)
        trainer.train()
        ends.append(weights(trainer.model))
    assert torch.equal(*ends)


def test_with_lora_the_adapter_alone_learns_against_the_model_without_it(base, tmp_path):
    config = Config(model_name_or_path=str(base), use_peft=True, lora_r=4, lora_alpha=8)
    model = load_model(config, quiet=True)
    trainer = make_trainer(tmp_path, model=model, max_steps=6)
    trainer.train()
    rows, plain = trainer.train_dataset, make_model()
    row = rows[0]
    expected = plain_logp(plain, row["prompt_ids"], row["completion_ids"]).item()
    assert row["reference"][0] == pytest.approx(expected, rel=1e-5)
    frozen = {n: p for n, p in trainer.model.named_parameters() if "lora_" not in n}
    assert frozen
    assert not any(p.requires_grad for p in frozen.values())
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


def broken(**changes):
    draw = random.Random(0)
    names = ("prompt_ids", "completion_ids")
    rows = [{name: random_ids(3, draw) for name in names} | {"label": i % 2 == 0} for i in range(4)]
    return Dataset.from_list([row | changes for row in rows])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken(label=True), "expected good and bad completions, found 4 good of 4"),
        (broken(label=False), "expected good and bad completions, found 0 good of 4"),
        (broken(label=None), "completion 0: expected a label, true or false"),
        (broken().remove_columns("label"), "label missing"),
        (broken(prompt_ids=[3, 4]), "at least 2 prompts, found 1"),
        (broken().select([]), "at least one completion"),
    ],
)
def test_data_that_kto_cannot_learn_from_are_refused_in_one_line(data, message, tmp_path):
    with pytest.raises(DataError, match=message) as refused:
        make_trainer(tmp_path, own={"completions": data})
    assert "\n" not in str(refused.value)


def test_a_loss_that_asks_for_what_nobody_has_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="expected arguments among logps, ref_logps"):
        make_trainer(tmp_path, loss=lambda logps, desirable: logps * desirable)


def test_weights_outside_of_what_the_authors_advise_are_said():
    """One good of four: lambda_D 3 to 4.5 times lambda_U evens them out."""
    labels = [True, False, False, False]
    assert weights_advice(labels, (3.0, 1.0)) is None
    assert weights_advice(labels, (4.5, 1.0)) is None
    assert weights_advice([True, False], (1.0, 1.0)) is None
    assert "--desirable_weight 3 to 4.5" in weights_advice(labels, (1.0, 1.0))
    assert weights_advice(labels, (2.9, 1.0))
    assert weights_advice(labels, (4.6, 1.0))
