"""A run that was stopped and resumed ends with the weights of a run that never stopped."""

import json
import shutil

import pytest
import torch

from posttrain.errors import ConfigError, DataError
from posttrain.run.checkpoints import list_checkpoints, newest_whole_checkpoint
from posttrain.run.folder import read_log
from posttrain.trainers.fit import fit, training_arguments
from posttrain.trainers.known_reference import load_reference
from posttrain.trainers.preference import FILE_NAME
from tests.conftest import make_model
from tests.trainers.tiny import BATCH, KINDS, TRAINERS, Config, logged, pairs, weights

RL_SETTINGS = {"beta": 0.05, "updates_per_rollout": 2}


def run(kind, folder, *, model=None, **settings):
    """`fit` as a recipe calls it, with save_steps 2."""
    config = Config(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH[kind],
        **{"save_steps": 2, **settings},
    )
    own = {**RL_SETTINGS, "samples_path": folder / "samples.jsonl"} if kind == "rl" else {}
    folder.mkdir(exist_ok=True)
    trainer = TRAINERS[kind](model or make_model(), training_arguments(config), **own)
    fit(trainer, config)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Kind -> (its folder, its trainer): four steps without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return {kind: (folder / kind, run(kind, folder / kind)) for kind in KINDS}


def stopped_at_2(source, target):
    """What a run that died after its second step, in the middle of the next save, left behind."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "model")
    (target / "checkpoints" / "checkpoint-4" / "manifest.json").unlink()
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_weights_and_logs(kind, whole, tmp_path):
    """From checkpoint 2 in a fresh trainer; for RL with a reference and rollouts of two steps."""
    folder, expected = whole[kind]
    stopped = stopped_at_2(folder, tmp_path / "run")
    newest = newest_whole_checkpoint(stopped / "checkpoints")
    assert newest.name == "checkpoint-2"
    resumed = run(kind, stopped, resume=True)
    assert resumed.state.global_step == 4
    assert torch.equal(weights(resumed.model), weights(expected.model))
    assert logged(resumed, "loss") == logged(expected, "loss")
    steps = [(r["step"], r["loss"]) for r in read_log(stopped / "metrics.jsonl") if "loss" in r]
    assert steps == [
        (r["step"], r["loss"]) for r in read_log(folder / "metrics.jsonl") if "loss" in r
    ]
    if kind == "rl":
        assert read_log(stopped / "samples.jsonl") == read_log(folder / "samples.jsonl")


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_optimizer_state_a_resumed_run_would_end_elsewhere(kind, whole, tmp_path):
    """The control: the same weights at step 2, but Adam's memory of a later step."""
    folder, expected = whole[kind]
    stopped = stopped_at_2(folder, tmp_path / "run")
    checkpoints = stopped / "checkpoints"
    shutil.copy(checkpoints / "checkpoint-4" / "optimizer.pt", checkpoints / "checkpoint-2")
    path = checkpoints / "checkpoint-2" / "manifest.json"
    manifest = json.loads(path.read_text())
    other = json.loads((folder / "checkpoints/checkpoint-4/manifest.json").read_text())
    manifest["files"]["optimizer.pt"] = other["files"]["optimizer.pt"]
    path.write_text(json.dumps(manifest))
    resumed = run(kind, stopped, resume=True)
    assert (weights(resumed.model) - weights(expected.model)).abs().max() > 1e-5


def test_the_saved_model_is_the_trained_one(whole):
    from transformers import AutoModelForCausalLM

    for folder, trainer in whole.values():
        saved = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
        for name, weight in trainer.model.state_dict().items():
            assert torch.equal(saved[name], weight)
        assert {path.name for path in (folder / "model").iterdir()} >= {
            "config.json", "model.safetensors", "tokenizer.json",
        }  # fmt: skip
        assert not (folder / "model" / "training_args.bin").exists()


def test_only_the_newest_whole_checkpoints_are_kept(tmp_path):
    trainer = run("sft", tmp_path / "run", max_steps=6, save_total_limit=1)
    assert trainer.state.global_step == 6
    left = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in left] == ["checkpoint-6"]


def test_a_resumed_dpo_run_uses_the_reference_of_its_first_start(whole, tmp_path, monkeypatch):
    """Not the half-trained model that it resumes with; and none is computed anew."""
    from posttrain.trainers import preference

    monkeypatch.setattr(preference, "compute_reference", lambda *_, **__: pytest.fail("computed"))
    folder, expected = whole["dpo"]
    stopped = stopped_at_2(folder, tmp_path / "run")
    resumed = run("dpo", stopped, resume=True, model=make_model(seed=7))  # weights come from disk
    assert torch.equal(resumed.train_dataset.reference, expected.train_dataset.reference)
    assert torch.equal(weights(resumed.model), weights(expected.model))


def test_a_dpo_run_resumed_for_more_steps_scores_the_new_pairs_with_the_starting_model(
    whole, tmp_path
):
    """The reference is what a run of all steps from the beginning has; another model is refused."""
    _, expected = whole["dpo"]
    short = run("dpo", tmp_path / "run", max_steps=2)
    known = short.train_dataset.reference.isfinite().all(1)
    assert 0 < known.sum() < len(known)
    with pytest.raises(DataError, match="expected the model that the run was started from"):
        run("dpo", tmp_path / "run", resume=True, model=make_model(seed=7))
    longer = run("dpo", tmp_path / "run", resume=True)
    torch.testing.assert_close(
        longer.train_dataset.reference, expected.train_dataset.reference, rtol=1e-5, atol=1e-5
    )
    saved = load_reference(tmp_path / "run" / "checkpoints" / FILE_NAME, pairs())
    assert torch.equal(saved, longer.train_dataset.reference)


def test_a_dpo_run_resumed_with_other_data_or_without_its_reference_is_refused(whole, tmp_path):
    stopped = stopped_at_2(whole["dpo"][0], tmp_path / "run")
    config = Config(
        output_dir=str(stopped), save_steps=2, resume=True, per_device_train_batch_size=8
    )
    other = TRAINERS["dpo"](make_model(), training_arguments(config), pairs=pairs(24, seed=3))
    with pytest.raises(DataError, match="made for other data than this run's 24 rows"):
        fit(other, config)
    (stopped / "checkpoints" / FILE_NAME).unlink()
    with pytest.raises(DataError, match="Start the run anew"):
        run("dpo", stopped, resume=True)


def test_resuming_where_nothing_is_starts_anew(whole, tmp_path):
    trainer = run("sft", tmp_path / "run", resume=True)
    assert torch.equal(weights(trainer.model), weights(whole["sft"][1].model))


def test_a_finished_run_is_not_trained_a_step_further(whole, tmp_path, capsys):
    folder, _ = whole["sft"]
    shutil.copytree(folder, tmp_path / "run")
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    resumed = run("sft", tmp_path / "run", resume=True)
    assert resumed.state.global_step == 0
    assert "nothing is left to train" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_damaged_reference_log_probs_are_refused(damage, whole, tmp_path):
    stopped = stopped_at_2(whole["dpo"][0], tmp_path / "run")
    path = stopped / "checkpoints" / FILE_NAME
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content if damage == "flipped" else content[:-9])
    with pytest.raises(DataError, match="is missing or damaged"):
        run("dpo", stopped, resume=True)


def test_a_run_that_starts_anew_says_why_and_logs_each_step_once(whole, tmp_path, capsys):
    shutil.copytree(whole["sft"][0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        (checkpoint / "manifest.json").unlink()
    run("sft", tmp_path / "run", resume=True)
    assert "starts anew: no checkpoint in it is whole" in capsys.readouterr().out
    steps = [r["step"] for r in read_log(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert steps == [1, 2, 3, 4]


def test_a_run_cannot_take_back_steps(whole, tmp_path):
    stopped = stopped_at_2(whole["sft"][0], tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^--max_steps: expected at least 2, the steps of"):
        run("sft", stopped, resume=True, max_steps=1)


def test_a_resumed_run_may_save_and_log_at_other_steps(whole, tmp_path):
    """transformers would go on with the intervals that stand in the checkpoint."""
    stopped = stopped_at_2(whole["sft"][0], tmp_path / "run")
    resumed = run("sft", stopped, resume=True, logging_steps=2, save_steps=3)
    assert (resumed.state.save_steps, resumed.state.logging_steps) == (3, 2)
    assert [r["step"] for r in read_log(stopped / "metrics.jsonl") if "loss" in r] == [1, 2, 4]
    names = {path.name for path in list_checkpoints(stopped / "checkpoints")}
    assert names == {"checkpoint-3", "checkpoint-4"}
