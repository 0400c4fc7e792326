"""Mistakes that people make, in flags, files, data, models and rewards: one to three lines each.

Every case of cases/mistakes.jsonl is a command line with the files that it reads. It must end with
status 2 and without a traceback, say what its `says` holds, and leave no run folder behind; the
model is not loaded where the input alone decides.
"""

import base64
import importlib
import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import load_documents, load_pairs, load_prompts
from posttrain.errors import PosttrainError
from posttrain.models import load as loading
from posttrain.run.options import load, parse, plain_errors
from recipes import sft
from tests.cases import read_cases
from tests.conftest import make_tokenizer

CASES = read_cases(__file__, "mistakes")
DATASET = {"text": {"prompt": "5 6", "completion": "7"}, "pairs": {"prompt": "5", "chosen": "6",
           "rejected": "7"}, "problems": {"question": "5 6", "answer": "7"}}  # fmt: skip
READS = {"sft": "text", "base": "text", "dpo": "pairs", "reward_model": "pairs", "kto": "pairs",
         "prm": "pairs"}  # fmt: skip


def write_files(case: dict, base: Path, folder: Path) -> None:
    """The case's files; a model is a copy of the tiny one with some files replaced or removed."""
    shutil.copytree(base, folder / "model")
    for kind, row in DATASET.items():
        (folder / f"{kind}.jsonl").write_text((json.dumps(row) + "\n") * 8)
    for name, content in case.get("files", {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        elif content.startswith("base64:"):
            path.write_bytes(base64.b64decode(content.removeprefix("base64:")))
        else:
            path.write_text(content.replace("{tmp}", str(folder)), encoding="utf-8")


def command_line(case: dict, folder: Path) -> list[str]:
    """The case's flags, after the usual ones that they do not give themselves."""
    flags = [flag.replace("{tmp}", str(folder)) for flag in case.get("flags", [])]
    usual = {
        "model_name_or_path": f"{folder}/model",
        "output_dir": f"{folder}/run",
        "dataset": f"{folder}/{READS.get(case['recipe'], 'problems')}.jsonl",
        "max_steps": "1",
        "per_device_train_batch_size": "8",
    }
    if case["recipe"] not in READS:
        usual |= {"num_generations": "4", "template": "plain", "reward_workers": "0"}
    given_flags = {flag.partition("=")[0] for flag in flags}
    added = [
        (f"--{name}", value) for name, value in usual.items() if f"--{name}" not in given_flags
    ]
    return [word for pair in added for word in pair] + flags


def problem_of(case: dict, base: Path, folder: Path) -> str:
    """What is wrong with how the recipe took the mistake; empty if nothing is."""
    write_files(case, base, folder)
    recipe = importlib.import_module(f"recipes.{case['recipe']}")
    loaded, said, read = [], io.StringIO(), loading._read_weights
    watched = patch.object(loading, "_read_weights", lambda *a: loaded.append(a) or read(*a))
    try:
        with watched, redirect_stderr(said), redirect_stdout(io.StringIO()), plain_errors():
            recipe.main(parse(recipe.Config, command_line(case, folder)))
    except SystemExit as end:
        status = end.code
    except BaseException as error:  # a traceback
        return f"{type(error).__name__}: {error}"
    else:
        return "it ran"
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("Loading")]
    if status != 2 or not 1 <= len(lines) <= 3 or case["says"] not in said.getvalue():
        return f"status {status}: {said.getvalue()}"
    if loaded and not case.get("model_decides"):
        return "it loaded the model first"
    made = (folder / "run").exists() and not case.get("model_decides")
    return "it made a run folder" if made else ""


def test_there_are_many():
    assert len({json.dumps(case, sort_keys=True) for case in CASES}) == len(CASES) >= 240


def test_a_mistake_is_a_few_lines_and_status_2(base, tmp_path, monkeypatch):
    wrong = []
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        if problem := problem_of(case, base, folder):
            wrong.append(f"{case['what']}: {problem}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)


def test_the_usual_command_line_runs(base, tmp_path):
    """The control: without its mistake a case is a run."""
    (tmp_path / "x").mkdir()
    assert problem_of({"recipe": "sft", "says": ""}, base, tmp_path / "x") == "it ran"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
COLUMNS = st.sampled_from(
    [
        *("prompt", "completion", "messages", "chosen", "rejected", "question", "answer", "text"),
        *("instruction", "input", "output", "system", "history", "images", "conversations"),
        *("label", "weight", "tools", "chat_template_kwargs"),
    ]
)
ROWS = st.lists(st.dictionaries(COLUMNS, VALUES, min_size=1, max_size=5), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(rows=ROWS)
@pytest.mark.parametrize("load_rows", [load_documents, load_pairs, load_prompts])
def test_no_record_gives_a_traceback_or_is_lost_uncounted(load_rows, rows):
    said = []
    try:
        dataset = load_rows(rows, make_tokenizer(), template="plain", say=said.append)
    except PosttrainError:
        return
    dropped = int(said[0].partition("dropped ")[2].split(":")[0] or 0)
    assert len(dataset) + dropped >= len(rows)


@settings(max_examples=150, deadline=None)
@given(
    flags=st.lists(
        st.sampled_from([f"--{name}" for name in vars(sft.Config())]) | st.text(max_size=6),
        max_size=6,
    )
)
def test_no_command_line_gives_a_traceback(flags):
    with suppress(PosttrainError):
        load(sft.Config, flags)
