"""Long2short from settings to the table: each way makes a model, and a resumed run keeps it."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import long2short_ways as ways
import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.errors import ConfigError
from posttrain.report.card import card_of
from posttrain.run.folder import read_log
from recipes import long2short

# Some answers of any model have evenly many characters.
REWARD = """
def even(completions, **_):
    return [float(len(text) % 2 == 0) for text in completions]
"""
LONGEST, LIMIT = 40, 24


@pytest.fixture(scope="module")
def config(base_run, first_rows, tmp_path_factory) -> long2short.Config:
    folder = tmp_path_factory.mktemp("long2short")
    (folder / "rewards.py").write_text(REWARD)
    return long2short.Config(
        dataset=first_rows("problems", 8), eval_dataset=first_rows("heldout", 4),
        model_name_or_path=base_run.model, short_model=base_run.model, template="r1_zero",
        reward=f"{folder / 'rewards.py'}:even", reward_workers=0, num_generations=4,
        max_completion_length=LONGEST, short_completion_length=LIMIT, ratio=1.01, max_steps=2,
        sft_steps=2, dpo_steps=2, eval_steps=1, per_device_train_batch_size=8, logging_steps=1,
        output_dir=str(folder / "run"),
    )  # fmt: skip


def main(config: long2short.Config) -> tuple[list[dict], str]:
    with redirect_stdout(io.StringIO()) as said:
        found = long2short.main(config)
    return found, said.getvalue()


def test_a_dry_run_says_of_each_method_what_can_be_known_and_writes_nothing(config):
    found, said = main(replace(config, dry_run=True))
    assert found == []
    assert not Path(config.output_dir).exists()
    sampling, merge, shortest, dpo, rl = said.split("\n\n")
    assert "4 completions each: 32" in sampling
    assert "trains nothing" in merge
    for part in (shortest, dpo):
        assert "steps   2 of 8 examples" in part
        assert "are known after sampling" in part
    assert "steps   2 of " in rl
    assert "memory  about " in rl


@pytest.fixture(scope="module")
def done(config) -> tuple[list[dict], str]:
    return main(config)


def weights(model: str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(model).state_dict()


def test_the_table_has_a_row_for_the_start_and_for_each_way(config, done):
    found, said = done
    assert [row["name"] for row in found] == ["before", "merge", "shortest", "dpo", "rl"]
    assert found == json.loads(Path(config.output_dir, "summary.json").read_text())
    for row in found:
        tokens = f"{row['accuracy']:>10.1%}{row['mean_completion_tokens']:>9.1f}"
        assert f"{row['name']:10}{tokens}  {row['model']}" in said


def test_a_model_merged_with_itself_stays_and_every_other_way_moves_the_weights(config, done):
    start = weights(config.model_name_or_path)
    _, merged, *trained = done[0]
    for name, weight in weights(merged["model"]).items():
        torch.testing.assert_close(weight, start[name], rtol=0, atol=0)
    for row in trained:
        found = weights(row["model"])
        assert not any(torch.equal(found[name], weight) for name, weight in start.items()), row


def test_sft_and_dpo_learn_from_the_shortest_right_answers(config, done):
    assert done
    run = Path(config.output_dir)
    shortest: dict[str, int] = {}
    for group in read_log(run / "answers.jsonl"):
        for answer in group["answers"]:
            if answer["reward"] >= 1 and answer["finish_reason"] == "stop":
                tokens = min(answer["num_tokens"], shortest.get(group["prompt"], LONGEST))
                shortest[group["prompt"]] = tokens
    records = read_log(run / "records.jsonl")
    assert {record["prompt"]: record["num_tokens"] for record in records} == shortest != {}
    assert read_log(run / "pairs.jsonl")
    for name in ("shortest", "dpo"):
        assert [r["step"] for r in read_log(run / name / "metrics.jsonl") if "loss" in r] == [1, 2]


def test_each_model_says_what_it_was_trained_on(config, done):
    for row, data in zip(done[0][2:], ("records.jsonl", "pairs.jsonl", None), strict=True):
        trained_on = f"{config.output_dir}/{data}" if data else config.dataset
        card = card_of(Path(row["model"]).parent, row["model"], name="m")
        assert f"- data: `{trained_on}`" in card


def test_data_without_a_rewards_column_is_refused_before_the_run_begins(
    config, first_rows, tmp_path
):
    folder = tmp_path / "run"
    few = replace(config, methods=["merge", "rl"], reward="math", output_dir=str(folder))
    for data in ({"dataset": first_rows("preferences", 4)},
                 {"eval_dataset": first_rows("preferences", 4)}):  # fmt: skip
        with pytest.raises(ConfigError, match="needs 'answer', and the data has no such column"):
            main(replace(few, **data))
    assert not folder.exists()


def test_several_models_are_not_sent_to_one_repository(config):
    with pytest.raises(ConfigError, match=r"push_to_hub: expected a recipe of one model"):
        replace(config, push_to_hub=True).check()


def test_the_overlong_penalty_of_rl_counts_from_its_lower_limit(config):
    reward, _ = ways._short_rewards(replace(config, overlong_tokens=4))["overlong"]
    assert reward([""] * 2, completion_ids=[[7] * (LIMIT - 4), [7] * LIMIT]) == [0.0, -1.0]
    with pytest.raises(ConfigError, match=f"overlong_tokens: expected at most the {LIMIT} tokens"):
        ways.check_data(replace(config, overlong_tokens=LIMIT + 1), {})


def test_merging_alone_draws_no_answers(config, tmp_path):
    found, _ = main(replace(config, methods=["merge"], output_dir=str(tmp_path / "run")))
    assert [row["name"] for row in found] == ["before", "merge"]
    assert not Path(tmp_path, "run", "answers.jsonl").exists()


def test_rl_rewards_length_and_cuts_answers_early(config, done):
    assert done
    samples = read_log(Path(config.output_dir, "rl", "samples.jsonl"))
    assert max(sample["tokens"] for sample in samples) == LIMIT
    for sample in samples:
        parts = sample["accuracy"] + 0.2 * sample["format"] + 0.5 * sample["length"]
        assert sample["reward"] == pytest.approx(parts)


def test_a_resumed_run_keeps_what_is_finished_and_makes_the_rest(config, done, monkeypatch):
    run = Path(config.output_dir)
    (run / "merge" / "model").rename(run / "merge" / "aside")
    for name in ("tune_on_shortest", "prefer_shortest", "reinforce_short"):
        monkeypatch.setattr(ways, name, None)
    found, _ = main(replace(config, resume=True))
    assert found == done[0]
