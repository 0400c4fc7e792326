"""The quickstart with one step a stage: the chain, the summary, the table, short words first."""

import json
from functools import partial

import pytest

from posttrain.run.options import load
from recipes import quickstart
from tests.recipes.conftest import TOKENIZER

RECIPES = {name: getattr(quickstart, name) for name in ("base", "sft", "dpo", "r1_zero")}
DATA = {"base": "corpus", "sft": "sft", "dpo": "preferences", "r1_zero": "problems"}
SEED = 3
MOST_LINES_BEFORE_A_METRIC = 25


@pytest.fixture(scope="module")
def done(first_rows, tmp_path_factory) -> tuple:
    """(root folder, what main returned, what was printed)."""
    root = tmp_path_factory.mktemp("quickstart") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        for name, recipe in RECIPES.items():
            few = {"max_steps": 1, "dataset": first_rows(DATA[name], 8), "logging_steps": 1}
            few |= {"per_device_train_batch_size": 4}
            few |= {"base": {"model_name_or_path": TOKENIZER}, "r1_zero": {"num_generations": 2}
                    }.get(name, {})  # fmt: skip
            patch.setattr(recipe, "Config", partial(recipe.Config, **few))
        patch.setattr(quickstart, "HELD_OUT", first_rows("heldout", 6))
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        summary = quickstart.main(quickstart.Config(seed=SEED, output_dir=str(root)))
    return root, summary, "\n".join(printed)


def test_the_summary_holds_a_number_for_each_claim_and_stage(done):
    root, summary, _ = done
    assert json.loads((root / "summary.json").read_text()) == summary
    assert summary["seed"] == SEED
    assert [stage["name"] for stage in summary["stages"]] == ["base", "sft", "dpo", "r1_zero"]
    for stage in summary["stages"]:
        assert set(stage) == {"name", "accuracy", "format", "mean_completion_tokens", "seconds"}
        assert 0 <= stage["accuracy"] <= 1
        assert 0 <= stage["format"] <= 1
        assert 1 <= stage["mean_completion_tokens"] <= quickstart.MAX_TOKENS
        assert stage["seconds"] > 0


def test_each_stage_starts_where_the_table_says(done):
    root, _, _ = done
    start = {}
    for name, recipe in RECIPES.items():
        config = load(recipe.Config, ["--config", str(root / name / "config.yaml")])
        assert config.seed == SEED
        start[name] = config.model_name_or_path
    models = {name: str(root / name / "model") for name in RECIPES}
    assert start == {
        "base": TOKENIZER, "sft": models["base"], "dpo": models["sft"], "r1_zero": models["base"],
    }  # fmt: skip


def test_few_words_stand_before_the_first_metric_and_the_table_at_the_end(done):
    root, summary, said = done
    lines = said.splitlines()
    first_metric = next(i for i, line in enumerate(lines) if line.startswith("step 1/1  loss "))
    assert first_metric < MOST_LINES_BEFORE_A_METRIC
    last = lines[-8:]
    for stage in summary["stages"]:
        (row,) = [line for line in last if line.startswith(f"{stage['name']} ")]
        assert row.split() == [
            stage["name"], f"{stage['accuracy']:.1%}", f"{stage['format']:.1%}",
            f"{stage['mean_completion_tokens']:.1f}", f"{stage['seconds']:.0f}",
            str(root / stage["name"]),
        ]  # fmt: skip


def test_a_dry_run_says_all_of_each_stage_and_writes_nothing(
    first_rows, tmp_path, monkeypatch, capsys
):
    for name, recipe in RECIPES.items():
        few = {"dataset": first_rows(DATA[name], 8)}
        few |= {"model_name_or_path": TOKENIZER} if name == "base" else {}
        monkeypatch.setattr(recipe, "Config", partial(recipe.Config, **few))
    output = tmp_path / "run"
    assert quickstart.main(quickstart.Config(output_dir=str(output), dry_run=True)) == {}
    printed = capsys.readouterr().out
    for line in ("first example", "steps   ", "tokens  ", "engine  none", "memory  ", "dry run: "):
        assert printed.count(line) == len(quickstart.STAGES)
    assert not output.exists()
