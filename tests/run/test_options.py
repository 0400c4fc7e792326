"""Flags and YAML: one typed path, one-line errors that name the place, fast and without torch."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.run.folder import save_config
from posttrain.run.options import load, option, parse, plain_errors, validate
from posttrain.run.settings import (
    ModelConfig,
    RunConfig,
    check_trainer_keys,
    training_argument_names,
)
from posttrain.run.sources import notify_of_rename

ROOT = Path(__file__).parents[2]

RECIPE = '''"""A recipe that only parses."""
import atexit, sys
from dataclasses import dataclass
from typing import Literal
from posttrain.run.options import option, parse

def report_heavy_modules():
    loaded = {"torch", "transformers", "numpy", "datasets"} & set(sys.modules)
    if loaded:
        print("loaded", *loaded, file=sys.stderr)

atexit.register(report_heavy_modules)
from posttrain.run.settings import ModelConfig, RunConfig

@dataclass
class Config(ModelConfig, RunConfig):
    model_name_or_path: str = "a/model"
    output_dir: str = "runs/x"
    dataset: str = option("data/pairs.jsonl", "file of pairs")
    loss: Literal["dpo", "ipo"] = option("dpo", "preference loss")
    beta: float = option(0.1, "weight of the KL term", above=0)

if __name__ == "__main__":
    parse(Config)
'''


@dataclass
class Config(ModelConfig, RunConfig):
    model_name_or_path: str = "a/model"
    output_dir: str = "runs/x"
    dataset: str = option("data/pairs.jsonl", "file of pairs")
    loss: Literal["dpo", "ipo", "hinge"] = option("dpo", "preference loss")
    beta: float = option(0.1, "weight of the KL term", above=0)
    eval_dataset: str | None = option(None, "held-out pairs")
    margins: list[float] = option([0.5], "reward margins")
    stages: Literal[1, 2] = option(1, "stages")
    learning_rate: float = 5e-7


def from_yaml(folder: Path, text: str, *flags: str) -> Config:
    path = folder / "x.yaml"
    path.write_text(text)
    return load(Config, ["--config", str(path), *flags])


def yaml_error(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_yaml(folder, text)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder}/x.yaml, ")


def flag_error(*flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Config, flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_asks_for_large_pages_unless_the_user_has_said_otherwise(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    parse(Config, [])
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    parse(Config, [])
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_no_flags_give_the_defaults_of_the_recipe_and_of_its_mixins():
    assert load(Config, []) == Config()
    assert Config().learning_rate == 5e-7
    assert Config().max_steps == -1


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--beta", "2e-5"], "beta", 2e-5),
        (["--beta=.5"], "beta", 0.5),
        (["--beta", "1", "--beta", "2"], "beta", 2.0),
        (["--seed", "7"], "seed", 7),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--learning-rate", "1"], "learning_rate", 1.0),
        (["--use_peft"], "use_peft", True),
        (["--use_peft", "True"], "use_peft", True),
        (["--use_peft", "false"], "use_peft", False),
        (["--no_use_peft"], "use_peft", False),
        (["--use_peft", "--no_use_peft"], "use_peft", False),
        (["--loss", "hinge"], "loss", "hinge"),
        (["--stages", "2"], "stages", 2),
        (["--eval_dataset", "a b"], "eval_dataset", "a b"),
        (["--eval_dataset", "None"], "eval_dataset", None),
        (["--dataset=--odd"], "dataset", "--odd"),
        (["--dataset", "None"], "dataset", "None"),
        (["--dataset="], "dataset", ""),
        (["--margins", "1", "2"], "margins", [1.0, 2.0]),
        (["--lora_target_modules", "q_proj"], "lora_target_modules", ["q_proj"]),
    ],
)
def test_a_flag_becomes_the_value_of_its_type(flags: list[str], name: str, value: Any):
    found = getattr(load(Config, [*flags, *["--use_peft"] * name.startswith("lora")]), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("beta: 2e-5", "beta", 2e-5),  # YAML 1.1 reads this as a string
        ("beta: '0.5'", "beta", 0.5),
        ("beta: 3", "beta", 3.0),
        ("dataset: 1.10", "dataset", "1.10"),
        ("dataset: no", "dataset", "no"),
        ("dataset: ''", "dataset", ""),
        ("use_peft: yes", "use_peft", True),
        ("use_peft: false", "use_peft", False),
        ("eval_dataset: null", "eval_dataset", None),
        ("eval_dataset:", "eval_dataset", None),
        ("lora_target_modules: [q_proj, v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target_modules: []", "lora_target_modules", []),
        ("lora_target_modules: null", "lora_target_modules", None),
        ("margins:\n- 1\n- 2e0", "margins", [1.0, 2.0]),
        ("trainer: {adam_epsilon: 1e-6}", "trainer", {"adam_epsilon": 1e-6}),
        ("", "beta", 0.1),
    ],
)
def test_a_yaml_value_becomes_the_value_of_its_type(tmp_path, text: str, name: str, value: Any):
    text += "\nuse_peft: true" * name.startswith("lora")
    found = getattr(from_yaml(tmp_path, text), name)
    assert found == value
    assert type(found) is type(value)


@dataclass
class Renamed(Config):
    num_generations: int = option(4, "completions per prompt", was="answers_per_prompt")
    shuffle: bool = option(False, "shuffle the prompts", was="mix")


@dataclass
class InheritsRenamed(Renamed):
    num_generations: int = 8


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--answers_per_prompt", "5"], "num_generations", 5),
        (["--answers-per-prompt=6"], "num_generations", 6),
        (["--mix"], "shuffle", True),
        (["--no_mix"], "shuffle", False),
    ],
)
@pytest.mark.parametrize("config_class", [Renamed, InheritsRenamed])
def test_a_flag_is_accepted_under_its_former_name(config_class, flags, name: str, value: Any):
    assert getattr(load(config_class, flags), name) == value


def test_a_former_name_is_accepted_in_yaml_and_its_place_stays(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("beta: 1\nanswers_per_prompt: 7\n")
    assert load(Renamed, ["--config", str(path)]).num_generations == 7
    assert load(Renamed, ["--config", str(path), "--num_generations", "9"]).num_generations == 9
    path.write_text("beta: 1\nanswers_per_prompt: x\n")
    with pytest.raises(ConfigError, match="line 2, num_generations: expected a whole number"):
        load(Renamed, ["--config", str(path)])


def test_a_former_name_is_reported_once_on_stderr(capsys, tmp_path):
    notify_of_rename.cache_clear()
    for _ in range(2):
        load(Renamed, ["--answers_per_prompt", "5"])
    assert capsys.readouterr().err == "--answers_per_prompt is now --num_generations\n"
    path = tmp_path / "config.yaml"
    path.write_text("seed: 3\nanswers_per_prompt: 7\n")
    for _ in range(2):
        load(Renamed, ["--config", str(path)])
    expected = f"{path}, line 2: 'answers_per_prompt' is now 'num_generations'\n"
    assert capsys.readouterr().err == expected
    load(Renamed, ["--num_generations", "5"])
    assert capsys.readouterr().err == ""


def test_ranks_other_than_the_first_do_not_report_a_former_name(capsys, monkeypatch):
    notify_of_rename.cache_clear()
    monkeypatch.setenv("RANK", "1")
    load(Renamed, ["--answers_per_prompt", "5"])
    assert capsys.readouterr().err == ""
    notify_of_rename.cache_clear()


@pytest.mark.parametrize(
    "flags",
    [
        ["--answers_per_prompt", "5", "--num_generations", "5"],
        ["--num_generations", "5", "--answers_per_prompt", "5"],
        ["--mix", "--no_shuffle"],
        ["--no_mix", "--shuffle"],
    ],
)
def test_a_flag_under_both_names_is_refused(flags: list[str]):
    with pytest.raises(ConfigError, match=r"former name of --.*; keep one of the two"):
        load(Renamed, flags)


def test_a_yaml_key_under_both_names_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("answers_per_prompt: 5\nnum_generations: 5\n")
    with pytest.raises(ConfigError, match=r"line 2: 'num_generations' is set a second time"):
        load(Renamed, ["--config", str(path)])


def test_help_shows_the_present_name_only(capsys):
    with pytest.raises(SystemExit):
        parse(Renamed, ["--help"])
    shown = capsys.readouterr().out
    assert "--num_generations" in shown
    assert "answers_per_prompt" not in shown


def test_flags_win_over_yaml(tmp_path):
    config = from_yaml(tmp_path, "beta: 0.5\nloss: ipo\nuse_peft: true", "--beta", "0.7")
    assert (config.beta, config.loss, config.use_peft) == (0.7, "ipo", True)
    assert from_yaml(tmp_path, "use_peft: true", "--no_use_peft").use_peft is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--beta abc", "--beta: expected a number, found 'abc'."),
        ("--beta", "--beta: expected a number, found nothing."),
        ("--beta 1 2", "--beta: expected a number, found [1, 2]."),
        ("--seed 1.5", "--seed: expected a whole number, found '1.5'."),
        ("--use_peft maybe", "--use_peft: expected true or false, found 'maybe'."),
        ("--no_use_peft 1", "--no_use_peft: expected no value, found '1'."),
        ("--margins 1 x", "--margins: expected a list (a number each), found [1, x]."),
        ("--stages 3", "--stages: expected one of 1, 2; found '3'."),
        (
            "--loss dop",
            "--loss: expected one of dpo, ipo, hinge; found 'dop'. Did you mean 'dpo'?",
        ),
        ("--learnin_rate 1", "--learnin_rate: unknown flag. Did you mean '--learning_rate'?"),
        ("--zzz 1", "--zzz: unknown flag. --help lists the flags."),
        ("--beta 0", "--beta: expected a value above 0, found 0.0."),
        ("--beta nan", "--beta: expected a finite number, found nan."),
        ("--learning_rate 0", "--learning_rate: expected a value above 0, found 0.0."),
        ("--lora_dropout 1.5", "--lora_dropout: expected a value at most 1, found 1.5."),
        ("--max_steps 0", "--max_steps: expected -1 or at least 1, found 0."),
        ("x.yaml", "Expected a flag such as --config FILE, found 'x.yaml'."),
        ("--trainer x", "--trainer: not a flag; write 'trainer:' in a YAML file for --config."),
        ("--config no/such", "--config: expected one YAML file, found 'no/such'."),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(flags: str, message: str):
    assert flag_error(*flags.split()) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "beta: 1\n# why\nlearnin_rate: 3",
            "line 3: unknown key 'learnin_rate'. Did you mean 'learning_rate'?",
        ),
        ("beta: abc", "line 1, beta: expected a number, found 'abc'."),
        ("beta: true", "line 1, beta: expected a number, found 'true'."),
        ("beta: [1]", "line 1, beta: expected a number, found [1]."),
        (
            "margins: [1, ]\nlora_target_modules: [a, [b]]",
            "line 2, lora_target_modules: expected a list (text each) or none, found [a, None].",
        ),
        ("dataset:", "line 1, dataset: expected text, found nothing."),
        (
            "\nloss: dop",
            "line 2, loss: expected one of dpo, ipo, hinge; found 'dop'. Did you mean 'dpo'?",
        ),
        ("beta: 1\nbeta: 2", "line 2: 'beta' is set a second time; keep one of the two."),
        ("beta: [1\nloss: ipo", "line 2: not valid YAML: expected ',' or ']', but got ':'."),
        ("- beta", "line 1: expected 'setting: value' lines."),
        ("trainer: 3", "line 1, trainer: expected 'key: value' lines, found '3'."),
        (
            "trainer:\n  optm: x",
            "line 2, trainer.optm: expected a field of transformers.TrainingArguments. "
            "Did you mean 'optim'?",
        ),
        (
            "lora_r: 4\nper_device_train_batch_size: 0",
            "line 2, per_device_train_batch_size: expected a value at least 1, found 0.",
        ),
        ("seed: 1\nmax_steps: 0", "line 2, max_steps: expected -1 or at least 1, found 0."),
    ],
)
def test_a_wrong_yaml_line_is_one_line_that_names_it(tmp_path, text: str, message: str):
    assert yaml_error(tmp_path, text) == message


def test_a_misspelt_config_path_names_the_near_file(tmp_path):
    (tmp_path / "dpo.yaml").write_text("")
    assert flag_error("--config", f"{tmp_path}/dp0.yaml").endswith(
        f"Did you mean '{tmp_path}/dpo.yaml'?"
    )


def test_a_saved_config_reads_back_equal(tmp_path):
    config = Config(
        beta=1e-5,
        use_peft=True,
        lora_target_modules=["q_proj", "--odd", "None"],
        dataset="1.10",
        eval_dataset="naïve: 'x' #1",
        margins=[float("inf"), 1e20],
        stages=2,
        trainer={"optim": "adafactor", "adam_epsilon": 1e-6, "lr_scheduler_kwargs": {"min_lr": 0}},
    )
    save_config(config, tmp_path / "config.yaml")
    assert load(Config, ["--config", str(tmp_path / "config.yaml")]) == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_setting_without_default_is_required():
    @dataclass
    class Needy(RunConfig):
        pass

    with pytest.raises(ConfigError, match=r"^--output_dir is required: run folder"):
        load(Needy, [])
    assert load(Needy, ["--output_dir", "x"]).output_dir == "x"


def test_every_check_of_every_class_runs_also_for_a_config_built_in_python():
    @dataclass
    class Checked(Config):
        def check(self) -> None:
            if self.loss == "ipo" and self.beta > 1:
                raise ConfigError(f"beta: expected at most 1 with ipo, found {self.beta}.")

    validate(Checked(loss="ipo"))
    with pytest.raises(ConfigError, match=r"^beta: expected at most 1 with ipo, found 2\."):
        validate(Checked(loss="ipo", beta=2))
    with pytest.raises(ConfigError, match=r"^--beta: expected at most 1"):
        load(Checked, ["--loss", "ipo", "--beta", "2"])
    with pytest.raises(ConfigError, match=r"^max_steps: expected -1"):
        validate(Checked(max_steps=0))


def test_trainer_keys_are_those_of_transformers_training_arguments():
    from transformers import TrainingArguments

    names = training_argument_names()
    assert names == set(TrainingArguments.__dataclass_fields__)
    check_trainer_keys({"optim": "adafactor"}, own={"seed"})
    with pytest.raises(ConfigError, match=r"^trainer\.seed: expected no value here"):
        check_trainer_keys({"seed": 1}, own={"seed"})


def test_plain_errors_end_with_the_bare_message_and_let_bugs_through(capsys):
    with pytest.raises(SystemExit) as caught, plain_errors():
        raise DataError("pairs.jsonl, row 17: no 'rejected'.")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "pairs.jsonl, row 17: no 'rejected'.\n"
    with pytest.raises(ZeroDivisionError), plain_errors():
        _ = 1 / 0


def test_parse_reads_the_command_line_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--beta", "0.3"])
    assert parse(Config).beta == 0.3


def run_recipe(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """The finished process, which names heavy modules that it loaded on stderr."""
    path = folder / "recipe.py"
    path.write_text(RECIPE)
    return subprocess.run(
        [sys.executable, str(path), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_is_short_and_loads_no_torch(tmp_path):
    done = run_recipe(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) < 120
    for words in ("A recipe that only parses.", "--config", "--learning_rate", "peak learning"):
        assert words in done.stdout
    assert done.stdout.index("--beta") < done.stdout.index("--lora_r") < done.stdout.index("--seed")


def test_a_mistake_is_one_line_and_status_two(tmp_path):
    (tmp_path / "x.yaml").write_text("loss: ipo\nlearnin_rate: 2e-5\n")
    done = run_recipe(tmp_path, "--config", f"{tmp_path}/x.yaml")
    assert done.returncode == 2
    assert done.stderr == (
        f"{tmp_path}/x.yaml, line 2: unknown key 'learnin_rate'. Did you mean 'learning_rate'?\n"
    )
    assert done.stdout == ""


def test_a_right_command_line_loads_no_torch(tmp_path):
    done = run_recipe(tmp_path, "--loss", "ipo", "--use_peft", "true")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", 1, "expected no value here: it is the setting --learning_rate"),
        ("bf16", True, "expected one of .* would have no effect"),
        ("label_smoothing_factor", 0.1, "expected one of"),
        ("save_only_model", True, "expected one of"),
        ("auto_find_batch_size", True, "expected one of"),
        ("load_best_model_at_end", True, "expected one of"),
        ("adam_epsilon", "small", "expected a number, found 'small'"),
        ("adam_epsilon", True, "expected a number, found True"),
        ("data_seed", 1.5, "expected a whole number, found 1.5"),
        ("log_level", 3, "expected text, found 3"),
        ("adam_epsilonn", 1, "expected a field of .* Did you mean 'adam_epsilon'?"),
    ],
)
def test_what_trainer_may_not_set_is_refused(key, value, message):
    config = RunConfig(output_dir="runs/x", trainer={key: value})
    with pytest.raises(ConfigError, match=rf"^trainer\.{key}: {message}"):
        config.check()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", "expected none or .*, found wandbb. Did you mean 'wandb'?"),
        ("mlflow", "expected the package mlflow for mlflow, which is not installed"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(name, message):
    with pytest.raises(ConfigError, match=f"^report_to: {message}"):
        RunConfig(output_dir="runs/x", report_to=name).check()


def test_several_trackers_are_checked_one_by_one(tmp_path, monkeypatch):
    (tmp_path / "tensorboard.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    RunConfig(output_dir="runs/x", report_to="tensorboard").check()
    with pytest.raises(ConfigError, match=r"^report_to: expected none or .*, found trackkio"):
        RunConfig(output_dir="runs/x", report_to="tensorboard, trackkio").check()


def test_wandb_never_asks_for_a_login(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    keys = tmp_path / "netrc"
    keys.write_text("machine api.wandb.ai login user password secret\n")
    keys.chmod(0o600)
    config = RunConfig(output_dir="runs/x", report_to="wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"^report_to: wandb has no key"):
        config.check()
    monkeypatch.setenv("WANDB_MODE", "shared")  # that of several writers of one run, online
    with pytest.raises(ConfigError, match=r"^report_to: wandb has no key"):
        config.check()
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "k"), ("NETRC", str(keys))):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            config.check()


def test_names_on_the_hub_are_for_a_push():
    with pytest.raises(ConfigError, match="hub_model_id, hub_private_repo: expected with"):
        RunConfig(output_dir="runs/x", hub_model_id="ann/dpo").check()


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_settings_are_finite(value):
    with pytest.raises(ConfigError, match="expected a finite number"):
        load(Config, ["--learning_rate", value])
