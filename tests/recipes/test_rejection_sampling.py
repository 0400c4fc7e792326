"""Rejection sampling from settings to files: resumed as if never stopped, and good to train on."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.errors import ConfigError
from posttrain.rollouts import group as group_module
from posttrain.run.options import load
from recipes import dpo, rejection_sampling, reward_model, sft
from tests.recipes.conftest import ROOT, run

FILES = ("answers.jsonl", "records.jsonl", "pairs.jsonl", "report.json")


REWARD = """
def even_reward(completions, **_):
    return [float(len(text) % 2 == 0) for text in completions]
"""


@pytest.fixture(scope="module")
def config(base_run, first_rows, tmp_path_factory) -> rejection_sampling.Config:
    """Ten problems in batches of four; right is an answer of evenly many characters."""
    folder = tmp_path_factory.mktemp("rejection")
    (folder / "rewards.py").write_text(REWARD)
    return rejection_sampling.Config(
        dataset=first_rows("problems", 10), model_name_or_path=base_run.model, template="r1_zero",
        reward=f"{folder / 'rewards.py'}:even_reward", format_weight=0.5, num_generations=4,
        prompts_per_batch=4, max_completion_length=40, reward_workers=0,
        output_dir=str(folder / "run"),
    )  # fmt: skip


def main(config: rejection_sampling.Config) -> tuple[dict[str, bytes], str]:
    """The files that the run leaves, and what it said."""
    with redirect_stdout(io.StringIO()) as said:
        rejection_sampling.main(config)
    folder = Path(config.output_dir)
    return {name: (folder / name).read_bytes() for name in FILES}, said.getvalue()


@pytest.fixture(scope="module")
def whole(config) -> dict[str, bytes]:
    return main(config)[0]


def rows(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.splitlines()]


def test_records_are_right_answers_and_pairs_prefer_them(whole):
    groups, records, pairs = (rows(whole[name]) for name in FILES[:3])
    assert [len(group["answers"]) for group in groups] == [4] * 10
    reward = {(g["prompt"], a["text"]): a["reward"] for g in groups for a in g["answers"]}
    assert records
    for record in records:
        assert len(record["completion"]) % 2 == 0
        assert record["reward"] == reward[record["prompt"], record["completion"]] >= 1
    assert pairs
    for pair in pairs:
        assert len(pair["chosen"]) % 2 == 0
        chosen, rejected = (reward[pair["prompt"], pair[name]] for name in ("chosen", "rejected"))
        assert pair["margin"] == chosen - rejected >= 0.5


class Killed(Exception):
    pass


@pytest.mark.parametrize("cut", [0, 1])
def test_a_run_that_was_stopped_goes_on_to_the_same_files(
    config, whole, tmp_path, monkeypatch, cut
):
    """Stopped in its second batch; `cut`: bytes that a kill took from the end of the first."""
    config = replace(config, output_dir=str(tmp_path / "run"))
    drawn, seeds, roll_out = [], [], group_module.roll_out

    def stops_in_batch(last: int):
        def wrapped(generator, tokenizer, prompts, **settings):
            drawn.append(len(prompts))
            seeds.extend(settings["seeds"])
            if len(drawn) == last:
                raise Killed
            return roll_out(generator, tokenizer, prompts, **settings)

        return wrapped

    monkeypatch.setattr(group_module, "roll_out", stops_in_batch(2))
    with pytest.raises(Killed):
        main(config)
    answers = Path(config.output_dir, "answers.jsonl")
    assert len(rows(answers.read_bytes())) == 4
    if cut:
        answers.write_bytes(answers.read_bytes()[:-cut])
    drawn.clear()
    seeds.clear()
    monkeypatch.setattr(group_module, "roll_out", stops_in_batch(99))
    found, said = main(config)
    assert found == whole
    assert drawn == ([4, 4, 2] if cut else [4, 2])
    assert len(set(seeds)) == sum(drawn)  # no two prompts draw by the same numbers
    assert ("completions of 4 of 10 prompts are in" in said) == (not cut)


def stops_at_once(*_, **__):
    raise Killed


def test_a_finished_run_draws_and_writes_nothing(config, whole, monkeypatch):
    monkeypatch.setattr(group_module, "roll_out", stops_at_once)
    found, said = main(config)
    assert found == whole
    assert "is finished" in said


def test_a_run_is_not_continued_with_other_settings_or_other_data(config, whole, tmp_path):
    assert whole
    with pytest.raises(ConfigError, match=r"keep.*best"):
        main(replace(config, keep="shortest"))
    data = tmp_path / "problems.jsonl"
    data.write_bytes(Path(config.dataset).read_bytes())
    config = replace(config, dataset=str(data), seed=1, output_dir=str(tmp_path / "run"))
    assert main(config)[0]["answers.jsonl"] != whole["answers.jsonl"]  # for the seed is another
    data.write_text("".join(data.read_text().splitlines(True)[::-1][1:]))
    with pytest.raises(ConfigError, match=r"the content of --dataset .* is not what it was"):
        main(config)


def test_what_cannot_work_is_refused_before_an_earlier_run_is_moved(
    config, whole, first_rows, monkeypatch
):
    again = replace(config, resume=False)
    with pytest.raises(ConfigError, match="needs 'answer', and the data has no such column"):
        main(replace(again, reward="math", dataset=first_rows("preferences", 4)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        main(again)
    assert Path(config.output_dir, "answers.jsonl").read_bytes() == whole["answers.jsonl"]


def test_sft_and_dpo_train_on_what_it_writes(config, whole, base_run, tmp_path):
    assert whole
    folder = Path(config.output_dir)
    settings = {"model_name_or_path": base_run.model, "max_steps": 1}
    run(sft, tmp_path / "sft", dataset=str(folder / "records.jsonl"), **settings)
    run(dpo, tmp_path / "dpo", dataset=str(folder / "pairs.jsonl"), **settings)
    scored = run(reward_model, tmp_path / "scores", dataset=str(folder / "pairs.jsonl"), **settings)
    assert "margin" in scored.trainer.loss_inputs


def test_a_reward_model_scores_prompts_that_have_no_answer(config, base_run, first_rows, tmp_path):
    scorer = run(
        reward_model, tmp_path / "scorer", model_name_or_path=base_run.model, max_steps=1,
        dataset=first_rows("preferences", 4), per_device_train_batch_size=4,
    )  # fmt: skip
    settings = {"reward_model": scorer.model, "dataset": first_rows("preferences", 3)}
    found, _ = main(replace(config, **settings, output_dir=str(tmp_path / "run")))
    for group in rows(found["answers.jsonl"]):
        whole = [a for a in group["answers"] if a["finish_reason"] == "stop"]
        assert all(a["reward"] == a["parts"]["score"] for a in group["answers"])
        kept = [r for r in rows(found["records.jsonl"]) if r["prompt"] == group["prompt"]]
        assert [r["reward"] for r in kept] == [max(a["reward"] for a in whole)][: len(whole)]


def test_rules_that_need_right_answers_need_a_bound_beside_a_reward_model():
    flags = ["--reward_model", "some/model"]
    assert load(rejection_sampling.Config, flags).keep == "best"
    for more in (["--keep", "shortest"], ["--pairs", "shortest_longer"]):
        with pytest.raises(ConfigError, match="min_reward"):
            load(rejection_sampling.Config, flags + more)
        load(rejection_sampling.Config, [*flags, *more, "--min_reward", "0.5"])


def test_a_setting_that_the_rule_does_not_have_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="limit: best has no such setting"):
        main(replace(config, limit=2, output_dir=str(tmp_path / "run")))


def test_without_flags_it_asks_the_sft_model():
    config = rejection_sampling.Config()
    assert (ROOT / config.dataset).is_file()
    assert (config.model_name_or_path, config.template) == ("runs/sft/model", "alpaca")
