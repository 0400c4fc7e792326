"""RewardTrainer: it learns who was chosen, and what it saves scores alike everywhere."""

import math
import shutil
from functools import partial

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from posttrain.errors import ConfigError, DataError
from posttrain.losses import bradley_terry_loss, kwise_loss
from posttrain.models.reward_model import load_reward_model
from posttrain.packed.scalar import zero_heads
from posttrain.trainers.fit import fit, training_arguments
from posttrain.trainers.reward import RewardTrainer
from tests.conftest import EOS, make_tokenizer
from tests.trainers.tiny import Config, arguments, logged, pairs, weights


def load(base, **settings):
    config = Config(model_name_or_path=str(base), **settings)
    return load_reward_model(config, make_tokenizer(), quiet=True)


def reward_trainer(base, folder, *, model=None, own=None, **changes):
    args = arguments(folder, **{"per_device_train_batch_size": 8, **changes})
    settings = {"pairs": pairs(), "tokenizer": make_tokenizer(), **(own or {})}
    return RewardTrainer(load(base) if model is None else model, args, **settings)


def run(base, folder, **settings):
    """`fit` as the recipe calls it."""
    config = Config(
        model_name_or_path=str(base), output_dir=str(folder), per_device_train_batch_size=8,
        **settings,
    )  # fmt: skip
    model = load_reward_model(config, make_tokenizer(), quiet=True)
    trainer = RewardTrainer(
        model, training_arguments(config), pairs=pairs(), tokenizer=make_tokenizer()
    )
    fit(trainer, config)
    return trainer


def score_alone(model, pair, completion):
    with torch.no_grad():
        return model(torch.tensor([pair["prompt_ids"] + pair[completion]])).logits[0, 0].item()


def test_it_learns_which_completions_are_chosen(base, tmp_path):
    """From a loss of log 2, at equal rewards, to nearly every pair right."""
    data = pairs(16)
    model = load(base)
    zero_heads(model)
    trainer = reward_trainer(
        base, tmp_path, model=model, own={"pairs": data, "eval_pairs": data}, max_steps=12,
        per_device_train_batch_size=16,
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.5 * math.log(2)
    found = trainer.evaluate()
    assert found["eval_pair_accuracy"] > 0.95
    margins = [
        score_alone(trainer.model, pair, "chosen_ids")
        - score_alone(trainer.model, pair, "rejected_ids")
        for pair in data
    ]
    assert found["eval_margin"] == pytest.approx(sum(margins) / 16, rel=1e-4)
    both = (found["eval_chosen_reward"] + found["eval_rejected_reward"]) / 2
    assert found["eval_reward"] == pytest.approx(both, abs=1e-5)


def test_the_loss_gets_each_pairs_own_rewards_and_margin(base, tmp_path):
    seen = []

    def spy(chosen, rejected, *, margin):
        seen.append((chosen.tolist(), rejected.tolist(), margin.tolist()))
        return bradley_terry_loss(chosen, rejected, margin=margin)

    margins = [i / 10 for i in range(8)]
    data = pairs(8).add_column("margin", margins)
    trainer = reward_trainer(base, tmp_path, own={"pairs": data, "loss": spy})
    trainer.microbatch_loss(trainer.model, data.to_list())
    ((chosen, rejected, margin),) = seen
    assert margin == pytest.approx(margins)
    for values, name in ((chosen, "chosen_ids"), (rejected, "rejected_ids")):
        expected = [score_alone(trainer.model, pair, name) for pair in data]
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_how_a_batch_is_cut_changes_nothing(base, tmp_path):
    ends = []
    for cut in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"own": {"max_tokens_per_microbatch": 50}},
    ):
        trainer = reward_trainer(base, tmp_path, **cut)
        trainer.train()
        ends.append(weights(trainer.model))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-6, rtol=0)


def test_gradient_checkpointing_changes_nothing(base, tmp_path):
    ends = []
    for recompute in (False, True):
        trainer = reward_trainer(base, tmp_path, activation_checkpointing=recompute)
        trainer.train()
        ends.append(weights(trainer.model))
    assert torch.equal(*ends)
    assert trainer.model.base_model.layers[0].gradient_checkpointing


def test_the_saved_model_scores_alike_in_transformers_and_is_a_start_for_ours(base, tmp_path):
    trainer = run(base, tmp_path / "run")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    ours = load(tmp_path / "run" / "model")
    assert saved.config.architectures == ["LlamaForSequenceClassification"]
    assert saved.config.num_labels == 1
    for pair in pairs(4):
        expected = score_alone(trainer.model, pair, "chosen_ids")
        for model in (saved, ours):
            assert score_alone(model, pair, "chosen_ids") == pytest.approx(expected, abs=1e-5)


def test_where_padding_is_the_end_token_the_saved_model_still_reads_the_end(base, tmp_path):
    """With pad = eos transformers would read the token before the end, silently."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = load(base)
    model.config.pad_token_id = EOS
    ended = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, EOS]}
    wrong = score_alone(model, ended, "chosen_ids")
    trainer = reward_trainer(base, tmp_path, model=model, own={"tokenizer": tokenizer})
    right = score_alone(trainer.model, ended, "chosen_ids")
    cut = {"prompt_ids": [5, 6], "chosen_ids": [7, 8]}
    assert wrong == pytest.approx(score_alone(model, cut, "chosen_ids"), abs=1e-6)
    assert abs(right - wrong) > 1e-3
    trainer.save_model(str(tmp_path / "model"))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert score_alone(saved, ended, "chosen_ids") == pytest.approx(right, abs=1e-5)


@pytest.mark.parametrize("peft", [{}, {"use_peft": True, "lora_r": 4}])
def test_a_resumed_run_ends_with_the_same_weights(base, peft, tmp_path):
    whole = run(base, tmp_path / "whole", save_steps=2, **peft)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "manifest.json").unlink()
    resumed = run(base, tmp_path / "run", save_steps=2, resume=True, **peft)
    assert resumed.state.global_step == 4
    assert len(logged(resumed, "loss")) == 4
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), atol=1e-6, rtol=0)


def test_a_lora_adapter_brings_its_head_along(base, tmp_path):
    """Trained head and adapter, saved; loaded by ours and by PEFT they score as trained."""
    from peft import AutoPeftModelForSequenceClassification

    trainer = run(base, tmp_path / "run", use_peft=True, lora_r=4)
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()
    start, (pair,) = load(base), pairs(1)
    expected = score_alone(trainer.model, pair, "chosen_ids")
    assert abs(expected - score_alone(start, pair, "chosen_ids")) > 5e-3
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "model", num_labels=1
    )
    for model in (load(tmp_path / "run" / "model"), theirs.eval()):
        assert score_alone(model, pair, "chosen_ids") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"pairs": pairs(0)}, DataError, "at least one pair"),
        ({"pairs": pairs(4).remove_columns("rejected_ids")}, DataError, "rejected_ids missing"),
        ({"pairs": pairs(2).add_column("margin", [0.5, -1.0])}, DataError, "pair 1: .* -1.0"),
        ({"pairs": pairs(2).add_column("margin", [1.0, None])}, DataError, "pair 1: .* None"),
        ({"eval_pairs": pairs(2).add_column("margin", [1.0, 1.0])}, DataError, "the other has"),
        ({"loss": kwise_loss}, ConfigError, "expected arguments among chosen, rejected"),
        (
            {
                "pairs": pairs(2).add_column("margin", [1.0, 1.0]),
                "loss": partial(bradley_terry_loss, margin=0.5),
            },
            ConfigError,
            "margin=0.5 is bound",
        ),
    ],
)
def test_what_it_cannot_train_on_is_refused_with_a_reason(base, change, error, said, tmp_path):
    with pytest.raises(error, match=said):
        reward_trainer(base, tmp_path, own=change)
