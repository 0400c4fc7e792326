"""How many of our modules a reader opens to follow one DPO step; the lists are in the failures."""

import json
from pathlib import Path

import pytest

from posttrain.trainers.base import PackedTrainer
from recipes import dpo
from tests.conftest import make_model, make_tokenizer
from tests.walks import entered_modules, shown

WHOLE_RUN = 33  # modules from the file of pairs to the saved model; it was 39
ONE_STEP = 25  # modules of the training itself: reference pass, step, log line


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> tuple[dict, dict]:
    """(modules of the whole run, modules of its training) of recipes/dpo.py, for one step."""
    folder = tmp_path_factory.mktemp("walk")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    row = {"prompt": "5 6 7", "chosen": "8 9", "rejected": "10 11 12"}
    (folder / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 4)
    config = dpo.Config(
        model_name_or_path=str(folder / "model"),
        output_dir=str(folder / "run"),
        dataset=str(folder / "pairs.jsonl"),
        template="plain",
        max_steps=1,
        per_device_train_batch_size=4,
    )
    training = {}
    plain = PackedTrainer.train

    def train(self, *args, **settings):
        with entered_modules() as modules:
            result = plain(self, *args, **settings)
        training.update(modules)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedTrainer, "train", train)
        with entered_modules() as whole:
            dpo.main(config)
    return {**whole, **training}, training


def test_a_dpo_step_enters_at_most_25_modules(walk):
    assert len(walk[1]) <= ONE_STEP, shown(walk[1])


def test_a_dpo_run_enters_few_modules_from_its_file_to_its_model(walk):
    assert len(walk[0]) <= WHOLE_RUN, shown(walk[0])


def test_the_walk_sees_the_recipe_the_data_the_loss_and_the_backward(walk):
    whole, training = walk
    assert "main" in whole["recipes/dpo.py"]
    assert "load_pairs" in whole["posttrain/data/load.py"]
    assert "dpo_loss" in training["posttrain/losses/preference.py"]
    assert "posttrain/packed/head.py" in training
    assert "recipes/dpo.py" not in training


def test_importing_a_module_does_not_count(tmp_path, monkeypatch):
    """Only calls do: the class body and the module body below are no functions."""
    monkeypatch.setattr("tests.walks.ROOT", Path(tmp_path))
    monkeypatch.setattr("tests.walks.OURS", (f"{tmp_path}/posttrain/",))
    path = tmp_path / "posttrain" / "some.py"
    path.parent.mkdir()
    source = "class A:\n    x = 1\n\ndef f():\n    return A.x\n"
    names: dict = {}
    with entered_modules() as modules:
        exec(compile(source, str(path), "exec"), names)
    assert modules == {}
    with entered_modules() as modules:
        names["f"]()
    assert modules == {"posttrain/some.py": {"f"}}
