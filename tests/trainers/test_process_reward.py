"""ProcessRewardTrainer: only step ends are scored, and what it saves finds and scores steps."""

import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForTokenClassification

from posttrain.errors import ConfigError, DataError
from posttrain.losses import step_loss
from posttrain.models.process_reward import load_process_reward, step_ends
from posttrain.models.reward_model import PER_STEP, load_reward_model
from posttrain.trainers.fit import fit, training_arguments
from posttrain.trainers.process_reward import ProcessRewardTrainer, check_solutions
from tests.conftest import EOS, make_tokenizer
from tests.trainers.tiny import Config, arguments, logged, solutions, weights


def load(base, **settings):
    config = Config(model_name_or_path=str(base), **settings)
    return load_reward_model(config, make_tokenizer(), kind=PER_STEP, quiet=True)


def make_trainer(base, folder, *, own=None, model=None, **changes):
    args = arguments(folder, **{"per_device_train_batch_size": 8, **changes})
    settings = {"solutions": solutions(), "tokenizer": make_tokenizer(), **(own or {})}
    return ProcessRewardTrainer(model or load(base), args, **settings)


def plain_scores(model, row):
    """Logits at the ends of steps, by transformers' own forward of the token classifier."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    logits = model.eval()(ids).logits[0, :, 0]
    return logits[[len(row["prompt_ids"]) + end for end in row["step_ends"]]]


def test_loss_and_gradient_are_those_of_the_plain_token_classifier(base, tmp_path):
    """Mean over all steps of the batch; solutions of a prompt, packed behind it, see it alone."""
    trainer, plain = make_trainer(base, tmp_path), load(base)
    rows = solutions(8).to_list()
    count = trainer.count_items(rows)
    found = trainer.microbatch_loss(trainer.model.train(), rows) / count
    found.backward()
    terms = []
    for row in rows:
        for score, right in zip(plain_scores(plain, row), row["labels"], strict=True):
            terms.append(-torch.nn.functional.logsigmoid(score if right else -score))
    assert count == len(terms)
    expected = torch.stack(terms).mean()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    for mine, theirs in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=0)


def test_a_score_of_zero_costs_log_two_and_scores_have_the_slope_of_a_probability():
    scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = step_loss(scores, torch.tensor([True, False]))
    torch.testing.assert_close(loss, torch.full_like(loss, 2).log())
    loss.sum().backward()
    assert scores.grad.tolist() == [-0.5, 0.5]


def test_cutting_a_batch_changes_nothing(base, tmp_path):
    ends = []
    cuts = ({}, {"own": {"max_tokens_per_microbatch": 30}},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})  # fmt: skip
    for cut in cuts:
        trainer = make_trainer(base, tmp_path, **cut)
        trainer.train()
        ends.append(weights(trainer.model))
    assert (ends[0] - weights(load(base))).abs().max() > 1e-3
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-6, rtol=0)


def run(base, folder, **settings):
    config = Config(
        model_name_or_path=str(base), output_dir=str(folder), per_device_train_batch_size=8,
        **{"save_steps": 2, **settings},
    )  # fmt: skip
    model = load_reward_model(config, make_tokenizer(), kind=PER_STEP, quiet=True)
    trainer = ProcessRewardTrainer(
        model, training_arguments(config), solutions=solutions(), tokenizer=make_tokenizer(),
        separator=" 9",
    )  # fmt: skip
    fit(trainer, config)
    return trainer


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_ends_with_the_same_weights_and_what_is_saved_scores_alike(
    base, tmp_path, adapter
):
    """In transformers' own class, and as a process reward model of ours, separator included."""
    lora = {"use_peft": True, "lora_r": 4} if adapter else {}
    whole = run(base, tmp_path / "run", **lora)
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    resumed = run(base, tmp_path / "run", resume=True, **lora)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")

    folder, row = tmp_path / "run" / "model", solutions()[3]
    config = Config(model_name_or_path=str(folder), dtype="float32")
    prm = load_process_reward(config, make_tokenizer())
    assert prm.separator == " 9"
    both = [row["prompt_ids"]], [row["completion_ids"]]
    (scores,) = prm.scores(*both, [row["step_ends"]])
    if not adapter:
        saved = AutoModelForTokenClassification.from_pretrained(folder)
        assert scores == pytest.approx(plain_scores(saved, row).tolist(), abs=1e-5)
        with pytest.raises(ConfigError, match="is a token classifier, and a sequence classifier"):
            load_reward_model(config, make_tokenizer())
    prm.step_ends = lambda _: row["step_ends"]
    ((ends, probabilities),) = prm.steps(*both)
    assert ends == row["step_ends"]
    assert probabilities == pytest.approx(torch.tensor(scores).sigmoid().tolist(), abs=1e-6)
    assert prm(*both) == [min(probabilities)]


def test_it_learns_which_steps_are_right(base, tmp_path):
    data = solutions(16)
    trainer = make_trainer(
        base, tmp_path, max_steps=20, per_device_train_batch_size=16,
        own={"solutions": data, "eval_solutions": data},
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_label_accuracy"] > 0.95
    assert found["eval_right_steps_score"] > 0 > found["eval_wrong_steps_score"]


def test_steps_end_with_their_separator_and_the_last_with_the_completion():
    assert step_ends(["a", "\n", "\n", "b", ""], "\n") == [1, 4]
    assert step_ends(["a", "\n", ""], "\n") == [2]
    assert step_ends(["a", "b"], "\n") == [1]  # truncated, or one step
    assert step_ends(["a.\n", "b", ".\n\n", "c", ""], "\n") == [0, 2, 4]
    assert step_ends(["a", "\n", "\n", "b", ""], "\n\n") == [2, 4]
    assert step_ends([""], "\n") == [0]


def row(**changes):
    return {"prompt_ids": [5], "completion_ids": [6, 7, EOS], "step_ends": [1, 2],
            "labels": [True, False], **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(labels=[True, True])], "expected right and wrong steps, found 2 right of 2"),
        ([row(labels=[False, False])], "found 0 right of 2"),
        ([row(), row(labels=[True])], "solution 1: expected one label, .* 2 steps; found 1"),
        ([row(), row(labels=[])], "solution 1: expected one label"),
        ([row(labels=[True, None])], "solution 0: expected one label"),
        ([{k: v for k, v in row().items() if k != "labels"}], "labels missing"),
        ([], "at least one solution"),
    ],
)
def test_data_without_labels_to_learn_from_are_refused_in_one_line(rows, message):
    with pytest.raises(DataError, match=message) as refused:
        check_solutions(Dataset.from_list(rows) if rows else Dataset.from_dict({}))
    assert "\n" not in str(refused.value)
