"""How many of our modules a reader opens to follow one step; docs/walk.md names them all.

The lists of modules, with the functions that are called, are in the failures.
"""

import json
import re
from pathlib import Path

import pytest

from posttrain.rewards import pieces
from posttrain.run.options import parse
from recipes import dpo, grpo, r1_zero
from tests.conftest import make_model, make_tokenizer
from tests.walks import ROOT, entered_modules, modules_that_see, shown

# Modules that a run of one step enters, from its settings to model/, and that --clip_high passes.
PAIR_STEP, PROMPT_STEP, FLAG = 25, 43, 6
PAIR, PROMPT, CLIP = "A pair's way", "A prompt's way", "A flag's way"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, a file of pairs and one of problems."""
    folder = tmp_path_factory.mktemp("walk")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    pair = {"prompt": "5 6 7", "chosen": "8 9", "rejected": "10 11 12"}
    (folder / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 4)
    problem = {"question": "5 6 7", "answer": "8"}
    (folder / "problems.jsonl").write_text((json.dumps(problem) + "\n") * 4)
    return folder


def settings(folder: Path, data: str, run: str) -> dict:
    """Settings of a run of one step."""
    return {
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / run),
        "dataset": str(folder / data),
        "template": "plain",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
    }


def rl_settings(folder: Path, run: str) -> dict:
    """Settings of an RL run of one step, with the rewards in a worker process."""
    own = {
        "num_generations": 2,
        "max_completion_length": 8,
        "reward_workers": 1,
        "rollout": "hf",
    }
    return {**settings(folder, "problems.jsonl", run), **own}


@pytest.fixture(scope="module")
def pair_walk(folder) -> dict:
    """The modules that recipes/dpo.py enters in one step."""
    with entered_modules() as modules:
        dpo.main(dpo.Config(**settings(folder, "pairs.jsonl", "dpo")))
    return modules


@pytest.fixture(scope="module")
def prompt_walk(folder) -> dict:
    """The modules that recipes/r1_zero.py enters in one step."""
    pieces._workforce_of.cache_clear()  # threads that an earlier test started are not profiled
    with entered_modules() as modules:
        r1_zero.main(r1_zero.Config(**rl_settings(folder, "r1_zero")))
    return modules


def test_a_dpo_step_enters_at_most_25_modules(pair_walk):
    assert len(pair_walk) <= PAIR_STEP, shown(pair_walk)


def test_an_r1_zero_step_enters_at_most_42_modules(prompt_walk):
    assert len(prompt_walk) <= PROMPT_STEP, shown(prompt_walk)


def test_a_pairs_walk_sees_the_recipe_the_data_the_loss_and_the_backward(pair_walk):
    assert "main" in pair_walk["recipes/dpo.py"]
    assert "load_pairs" in pair_walk["posttrain/data/load.py"]
    assert "dpo_loss" in pair_walk["posttrain/losses/preference.py"]
    assert "posttrain/packed/head.py" in pair_walk


def test_a_prompts_walk_sees_the_rollout_and_the_loss_but_nothing_inside_reward_workers(
    prompt_walk,
):
    assert "roll_out" in prompt_walk["posttrain/rollouts/group.py"]
    assert "clipped_policy_loss" in prompt_walk["posttrain/losses/policy.py"]
    assert "posttrain/workers/pool.py" in prompt_walk
    assert "math_reward" not in prompt_walk["posttrain/rewards/math.py"]  # golds are checked here
    assert "posttrain/rewards/format.py" not in prompt_walk


@pytest.fixture(scope="module")
def clip_walk(folder) -> dict:
    """The modules that `--clip_high` passes in recipes/grpo.py."""
    values = {**rl_settings(folder, "grpo"), "clip_high": 0.3141}
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    with modules_that_see(["0.3141", 0.3141]) as modules:
        grpo.main(parse(grpo.Config, flags))
    return modules


def test_a_flag_passes_at_most_6_modules_on_its_way_to_the_loss(clip_walk):
    assert len(clip_walk) <= FLAG, shown(clip_walk)
    assert "clipped_policy_loss" in clip_walk["posttrain/losses/policy.py"]


def part_of(text: str, heading: str) -> str:
    """What stands between a heading and the next of its level."""
    level = heading.split()[0]
    _, found, rest = f"\n{text}".partition(f"\n{heading}\n")
    assert found, heading
    return rest.partition(f"\n{level} ")[0]


def modules_in(title: str) -> set[str]:
    """The modules that stand first in the table rows of a section of docs/walk*.md."""
    pages = ("walk", "walk_prompt", "walk_flag")
    text = "\n".join((ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in pages)
    rows = re.findall(r"^\| `([^`]+\.py)`", part_of(text, f"## {title}"), re.MULTILINE)
    assert len(rows) == len(set(rows)), "a module stands on two lines"
    return set(rows)


@pytest.mark.parametrize(("title", "walk"), [(PAIR, "pair_walk"), (PROMPT, "prompt_walk")])
def test_the_document_names_the_modules_of_a_walk_and_no_others(title, walk, request):
    entered, named = set(request.getfixturevalue(walk)), modules_in(title)
    assert (entered - named, named - entered) == (set(), set()), "(missing, too many)"


def test_the_document_names_the_modules_of_the_flag(clip_walk):
    named = modules_in(CLIP) - {"posttrain/errors.py"}  # passed by a value that is refused
    assert named == set(clip_walk)


def test_importing_a_module_does_not_count(tmp_path, monkeypatch):
    """Only calls do: class body and module body are no functions, and `g` is called by the body."""
    monkeypatch.setattr("tests.walks.ROOT", Path(tmp_path))
    monkeypatch.setattr("tests.walks.OURS", (f"{tmp_path}/posttrain/",))
    monkeypatch.syspath_prepend(tmp_path / "posttrain")
    path = tmp_path / "posttrain" / "walked_module.py"
    path.parent.mkdir()
    path.write_text(
        "class A:\n    x = 1\n\ndef f():\n    return A.x\n\ndef g():\n    return 1\n\ny = g()\n"
    )
    with entered_modules() as modules:
        import walked_module
    assert modules == {}
    with entered_modules() as modules:
        walked_module.f()
    assert modules == {"posttrain/walked_module.py": {"f"}}


def test_a_value_is_seen_bare_and_in_a_partial_but_not_inside_an_object(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.walks.ROOT", Path(tmp_path))
    monkeypatch.setattr("tests.walks.OURS", (f"{tmp_path}/posttrain/",))
    path = tmp_path / "posttrain" / "some.py"
    source = (
        "from functools import partial\n"
        "def bare(value):\n    return None\n"
        "def bound(loss):\n    return None\n"
        "def hidden(config):\n    return None\n"
    )
    names: dict = {}
    exec(compile(source, str(path), "exec"), names)
    with modules_that_see([0.25]) as modules:
        names["bare"](0.25)
        names["bound"](names["partial"](print, clip=0.25))
        names["hidden"]([0.25])
    assert modules == {"posttrain/some.py": {"bare", "bound"}}
