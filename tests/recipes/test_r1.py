"""R1 with one or two steps a stage: the chain, the data between stages, resuming, a stage alone."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import r1_rewards
import r1_stages
from r1_rewards import Later, SummaryReward, final_answer_matches

from posttrain.errors import ConfigError
from posttrain.models.load import load_tokenizer
from posttrain.run.folder import read_log
from posttrain.run.options import load, validate
from recipes import r1
from tests.recipes.conftest import ROOT, TOKENIZER

R1_DATA = ROOT / "data" / "r1"
STAGES = [
    "r1_zero",
    "cold_start_samples",
    "cold_start",
    "reasoning_rl",
    "curated_samples",
    "curated_sft",
    "reward_model",
    "scenario_rl",
    "student",
    "distill",
    "student_rl",
]
UNMEASURED = {"cold_start_samples", "curated_samples", "reward_model"}  # fmt: skip
# Some answers of any model have evenly many characters.
REWARD = """
def even(completions, **_):
    return [float(len(text) % 2 == 0) for text in completions]
"""
# Small steps keep the base model, some of whose answers end.
ONE_STEP = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4,
            "learning_rate": 1e-6}  # fmt: skip
RL = {**ONE_STEP, "num_generations": 2}
SAMPLES = {"max_prompts": 4, "num_generations": 8, "max_completion_length": 40}


@pytest.fixture(scope="module")
def config(base_run, first_rows, tmp_path_factory) -> r1.Config:
    folder = tmp_path_factory.mktemp("r1")
    (folder / "rewards.py").write_text(REWARD)

    def first(name: str, count: int) -> str:
        path = folder / f"{name}.jsonl"
        lines = (R1_DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(True)
        path.write_text("".join(lines[:count]), encoding="utf-8")
        return str(path)

    settings = dict.fromkeys(STAGES, ONE_STEP) | dict.fromkeys(["r1_zero", "reasoning_rl"], RL)
    settings |= {"scenario_rl": {**RL, "max_steps": 2}, "student_rl": RL, "cold_start_samples":
                 SAMPLES, "curated_samples": SAMPLES, "student": {**ONE_STEP, "hidden_size": 32}
                 }  # fmt: skip
    return r1.Config(
        model_name_or_path=base_run.model, tokenizer=TOKENIZER, corpus=first("corpus", 8),
        problems=first_rows("problems", 6), heldout=first_rows("heldout", 2),
        general=first("general", 5), general_prompts=first("general_prompts", 6),
        general_heldout=first("general_heldout", 2), preferences=first("preferences", 8),
        max_completion_length=24, reward=f"{folder / 'rewards.py'}:even", max_paragraph_chars=500,
        preference_from_step=1, settings=settings, seed=3, output_dir=str(folder / "run"),
    )  # fmt: skip


def main(config: r1.Config) -> tuple[dict, str]:
    with redirect_stdout(io.StringIO()) as said:
        summary = r1.main(config)
    return summary, said.getvalue()


def test_a_dry_run_says_of_each_stage_what_can_be_known_and_writes_nothing(config):
    """The base model, which was given, stands for all but the student, which is made untrained."""
    assert not Path(config.output_dir).exists()
    summary, said = main(replace(config, dry_run=True))
    assert summary == {}
    assert not Path(config.output_dir).exists()
    parts = said.split("\n\n")[1:]
    told = dict(zip(STAGES, parts, strict=True))
    assert [part.split()[0] for part in parts] == STAGES
    waiting = {"cold_start": "cold_start_samples", "curated_sft": "curated_samples",
               "distill": "curated_samples"}  # fmt: skip
    for name, part in told.items():
        assert "steps   " in part
        assert ("memory  about " in part) == (name not in waiting)
        assert ("stands for" in part) == (name not in ("r1_zero", "cold_start", "curated_sft",
                                                       "student"))  # fmt: skip
    for name, needed in waiting.items():
        assert f"are known once {needed} has run" in told[name]
    assert "base stands for that of curated_sft" in told["scenario_rl"]
    assert "student stands for that of student" in told["student_rl"]


@pytest.fixture(scope="module")
def done(config) -> tuple[dict, str]:
    return main(config)


def test_every_stage_is_measured_and_stands_in_the_table(config, done):
    summary, said = done
    root = Path(config.output_dir)
    assert json.loads((root / "summary.json").read_text()) == summary
    assert [stage["name"] for stage in summary["stages"]] == STAGES  # no base: it was given
    shares = {"accuracy", "format", "language", "preferred", "harmless"}
    for stage in summary["stages"]:
        measured = set() if stage["name"] in UNMEASURED else {*shares, "tokens"}
        assert set(stage) == {"name", "seconds", "cpu_seconds", *measured}
        assert all(0 <= stage[name] <= 1 for name in shares & measured)
        assert any(line.startswith(f"{stage['name']} ") for line in said.splitlines()[-15:])


def test_each_stage_starts_where_the_paper_says(config, done):
    assert done
    start = {}
    for name in STAGES:
        recipe = r1_stages.PLANS[name].recipe
        path = Path(config.output_dir, name, "config.yaml")
        found = load(recipe.Config, ["--config", str(path)])
        assert found.seed == config.seed
        start[name] = found.model_name_or_path.removeprefix(f"{config.output_dir}/")
    given = config.model_name_or_path
    assert start == {
        "r1_zero": given, "cold_start_samples": "r1_zero/model", "cold_start": given,
        "reasoning_rl": "cold_start/model", "curated_samples": "reasoning_rl/model",
        "curated_sft": given, "reward_model": "curated_sft/model",
        "scenario_rl": "curated_sft/model", "student": TOKENIZER, "distill": "student/model",
        "student_rl": "student/model",
    }  # fmt: skip


def test_the_student_is_as_wide_as_asked_for(config, done):
    assert done
    for name in ("student", "distill", "student_rl"):
        model = json.loads(Path(config.output_dir, name, "model", "config.json").read_text())
        assert (model["hidden_size"], model["num_attention_heads"]) == (32, 1)


def test_the_curated_data_are_the_rl_models_answers_and_the_general_data(config, done):
    assert done
    root = Path(config.output_dir)
    rows = read_log(root / "curated_samples.jsonl")
    general = [json.loads(line) for line in Path(config.general).read_text().splitlines()]
    assert rows[-len(general) :] == general
    sampled = read_log(root / "curated_samples" / "answers.jsonl")
    answers = {group["prompt"]: [a["text"] for a in group["answers"]] for group in sampled}
    reasoning = rows[: -len(general)]
    assert reasoning
    for row in reasoning:
        assert row["completion"] in answers[row["prompt"]]
        assert len(row["completion"]) % 2 == 0
    per_prompt = [sum(r["prompt"] == prompt for r in reasoning) for prompt in answers]
    assert max(per_prompt) <= config.curated_limit


def test_the_last_stage_rewards_each_kind_by_its_own_and_preferences_last(config, done):
    assert done
    kinds = {row["prompt"]: row["kind"] for row in
             read_log(Path(config.output_dir, "scenarios.jsonl"))}  # fmt: skip
    assert sorted(kinds.values()) == ["general"] * 6 + ["reasoning"] * 6
    samples = read_log(Path(config.output_dir, "scenario_rl", "samples.jsonl"))
    for sample in samples:
        (kind,) = {kind for prompt, kind in kinds.items() if prompt in sample["prompt"]}
        if kind == "reasoning":
            assert (sample["preference"], sample["harmless"], sample["format_general"]) == (0, 0, 0)
        else:
            assert (sample["accuracy"], sample["format_problems"]) == (0, 0)
            assert sample["step"] > 1 or sample["preference"] == sample["harmless"] == 0
        weighted = sample["accuracy"] + sample["language"] + sample["preference"]
        weighted += sample["harmless"] + 0.2 * (
            sample["format_problems"] + sample["format_general"]
        )
        assert sample["reward"] == pytest.approx(weighted)


def test_a_second_run_keeps_what_is_finished_and_measures_what_was_not(config, done, monkeypatch):
    result = Path(config.output_dir, "distill", "result.json")
    result.unlink()
    monkeypatch.setattr(r1_stages.Run, "_run", None)
    summary, said = main(config)
    without = [
        [{**stage, "seconds": 0} for stage in found["stages"]] for found in (summary, done[0])
    ]
    assert without[0] == without[1]
    assert said.count("is finished: kept") == len(STAGES) - 1


def test_one_stage_alone_is_made_again_and_the_earlier_run_moved_aside(config, done):
    assert done
    before = Path(config.output_dir, "reward_model", "env.json").read_text()
    summary, _ = main(replace(config, stages=["student_rl"], resume=False))
    assert [stage["name"] for stage in summary["stages"]] == STAGES  # the others' results stand
    assert Path(config.output_dir, "student_rl.1", "config.yaml").is_file()
    assert Path(config.output_dir, "reward_model", "env.json").read_text() == before


def test_a_changed_setting_of_a_finished_stage_is_refused(config, done):
    assert done
    with pytest.raises(ConfigError, match=r"--seed: expected 3 as in .*found 4"):
        main(replace(config, seed=4))


MISTAKES = [
    ({"stages": ["scenario_rl"]}, "stages: scenario_rl expected the result of curated_sft, "),
    ({"settings": {"distil": {}}}, "found 'distil'. Did you mean 'distill'?"),
    ({"settings": {"distill": {"max_step": 3}}}, "settings.distill.max_step: unknown setting of "
     "recipes/sft. Did you mean 'max_steps'?"),
    ({"settings": {"distill": {"max_steps": "few"}}}, "settings.distill.max_steps: expected a"),
    ({"settings": {"r1_zero": {"clip_low": 2}}}, "settings.r1_zero.clip_low: expected a value at"),
    ({"settings": {"r1_zero": 3}}, "settings.r1_zero: expected 'key: value' lines, found 3."),
    ({"settings": {"base": {"max_steps": 3}}}, "settings: expected none for base, which is"),
    ({"language": "english"}, "language: expected an ISO 639-1 code, found 'english'."),
    ({"among": ["en", "xx"]}, "language: expected an ISO 639-1 code, found 'xx'."),
    ({"reward": "maths"}, "found 'maths'. Did you mean 'math'?"),
    ({"harmless": "word"}, "found 'word'. Did you mean 'words'?"),
    ({"harmful_words": [""]}, "harmful_words: expected words, found an empty one."),
]  # fmt: skip


def validated(config: r1.Config) -> r1.Config:
    validate(config)
    return config


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_made(config, tmp_path, change, message):
    wrong = replace(config, output_dir=str(tmp_path / "run"), **change)
    with pytest.raises(ConfigError) as error:
        main(validated(wrong))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_settings_of_the_shipped_config_fit_the_recipes_that_they_are_for():
    path = ROOT / "recipes" / "configs" / "r1_qwen2.5_7b.yaml"
    run = r1_stages.Run(load(r1.Config, ["--config", str(path)]))
    assert run.stages == STAGES[:8] + STAGES[9:]  # both base models are given
    found = {name: run.settings(name) for name in run.stages}
    assert found["r1_zero"].learning_rate == found["scenario_rl"].learning_rate == 3e-6
    assert found["scenario_rl"].max_steps - run.config.preference_from_step == 400
    assert found["reward_model"].per_device_train_batch_size * 8 == 256
    assert found["distill"].model_name_or_path == "Qwen/Qwen2.5-Math-1.5B"
    assert found["curated_sft"].model_name_or_path == run.config.model_name_or_path


class Lengths:
    """A reward model whose score is the number of tokens less three."""

    def __call__(self, *, prompt_ids, completion_ids):
        assert len(prompt_ids) == len(completion_ids)
        return [len(ids) - 3 for ids in completion_ids]


def test_the_reward_model_sees_the_final_answer_alone_and_only_of_general_prompts():
    reward = Later(SummaryReward(Lengths(), load_tokenizer(TOKENIZER)), 2)
    given = {"prompt_ids": [[1]] * 4, "kind": ["general"] * 3 + ["reasoning"]}
    texts = ["<think>a b c d e</think><answer>12</answer>", " 12 ", "<think>12", "12"]
    late = reward(texts, **given, trainer_state=SimpleNamespace(global_step=2))
    assert late == [0.5, 0.5, 0.0, 0.0]  # two digits and the end: 1 / (1 + exp(0))
    early = reward(texts, **given, trainer_state=SimpleNamespace(global_step=1))
    assert early == [0.0] * 4


def test_a_preferred_answer_is_the_final_text_whatever_was_thought():
    texts = ["<think>x</think><answer>Hello  you.</answer>", " Hello you.", "<think>Hello you."]
    assert final_answer_matches(texts, answer=["Hello you."] * 3) == [1.0, 1.0, 0.0]


def test_reasoning_without_a_word_earns_no_language_reward():
    reward = r1_rewards.in_language(r1.Config())
    assert reward(["<think>1+1</think>", "<think>ones 十</think>"]) == [0.0, 0.5]
