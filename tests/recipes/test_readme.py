"""What the documents tell people to type works: commands parse, targets exist, code runs."""

import ast
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from posttrain import cli
from posttrain.run.options import load
from recipes import (
    base,
    distill,
    dpo,
    grpo,
    kimi_k15,
    kto,
    long2short,
    medusa,
    mtp,
    online_dpo,
    ppo,
    prm,
    quickstart,
    r1,
    r1_zero,
    rejection_sampling,
    reward_model,
    self_instruct,
    sft,
    trpo,
)
from tests.recipes.conftest import ROOT

README = ROOT / "README.md"
MODULES = {
    "base": base, "sft": sft, "dpo": dpo, "r1_zero": r1_zero, "grpo": grpo,
    "distill": distill, "kimi_k15": kimi_k15, "kto": kto, "prm": prm, "online_dpo": online_dpo,
    "reward_model": reward_model, "ppo": ppo, "quickstart": quickstart,
    "self_instruct": self_instruct, "rejection_sampling": rejection_sampling,
    "long2short": long2short, "trpo": trpo, "medusa": medusa, "mtp": mtp, "r1": r1,
}  # fmt: skip
PATTERNS = ("*.md", "docs/*.md", "data/*.md", "recipes/*.md", "recipes/*.py", "recipes/configs/*",
            "accelerate_configs/*.yaml")  # fmt: skip
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
STARTS = ("python recipes/", "accelerate launch ")
OPTIONAL = re.compile(r"\[([^]]*)\]")
# What a reader has to fill in: <name>, …, a variable or a file called my something.
PLACEHOLDER = re.compile(r"<[^>]*>|…|\.\.\.|\$\w+|my\.yaml")


def code_of(text: str) -> list[str]:
    """Fenced blocks and what stands between backticks in prose."""
    fenced = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return fenced.findall(text) + re.findall(r"`([^`\n]+)`", fenced.sub("", text))


def commands_in(text: str) -> list[str]:
    """Shell commands that start a recipe, alone on a line or between backticks.

    Lines that end in a backslash go on; what follows three spaces is a remark, unless flags.
    """
    text = re.sub(r"\s*\\+\n[\s#]*", " ", text)
    pieces = [line.strip(" #$>`") for line in text.splitlines()]
    pieces += re.findall(r"`([^`\n]+)`", text)
    found = [piece for piece in pieces if piece.startswith(STARTS)]
    return [re.split(r"\s{3,}(?!-)|\s#\s|`", command)[0] for command in dict.fromkeys(found)]


def commands() -> list:
    found = {}
    for path in DOCUMENTS:
        for command in commands_in(path.read_text(encoding="utf-8")):
            found.setdefault(command, f"{path.relative_to(ROOT)}: {command[:60]}")
    return [pytest.param(command, id=name) for command, name in found.items()]


def test_commands_are_found_in_code_in_prose_and_over_several_lines():
    text = """
    python recipes/sft.py            tiny model
# accelerate launch --x y recipes/dpo.py \\
#     --beta 1   # remark
Then run `python recipes/base.py --seed 1`, or python alone.
"""
    assert commands_in(text) == [
        "python recipes/sft.py",
        "accelerate launch --x y recipes/dpo.py --beta 1",
        "python recipes/base.py --seed 1",
    ]


def without_placeholders(words: list[str]) -> list[str]:
    """Each word that is to be filled in is left out, with the flag that it is the value of."""
    kept: list[str] = []
    for word in words:
        if not PLACEHOLDER.search(word):
            kept.append(word)
        elif kept and kept[-1].startswith("--"):
            kept.pop()
    return kept


@pytest.mark.parametrize("command", commands())
def test_a_command_in_the_documents_is_one_that_the_recipe_accepts(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = without_placeholders(shlex.split(OPTIONAL.sub(r"\1", command)))
    if "posttrain.cli" in words:  # -m posttrain.cli run NAME
        place = words.index("posttrain.cli")
        words[place - 1 : place + 3] = [f"recipes/{words[place + 2]}.py"]
    (script,) = [word for word in words if word.startswith("recipes/") and word.endswith(".py")]
    assert Path(script).is_file()
    before, flags = words[: words.index(script)], words[words.index(script) + 1 :]
    if "--report_to" in flags:  # a tracker is a package that is not installed for tests
        monkeypatch.setattr("posttrain.run.settings.check_trackers", lambda _: None)
    if "--push_to_hub" in flags:  # asks the Hub
        monkeypatch.setattr("posttrain.run.hub.check_push", lambda _: None)
    if flags != ["--help"]:
        load(MODULES[Path(script).stem].Config, flags)
    if before[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        arguments = launch_command_parser().parse_args([*before[2:], script])
        assert arguments.config_file is None or Path(arguments.config_file).is_file()


def tool_commands() -> list:
    """Those that start `posttrain`, alone on a line or between backticks."""
    found = {}
    for path in DOCUMENTS:
        text = re.sub(r"\s*\\+\n[\s#]*", " ", path.read_text(encoding="utf-8"))
        pieces = [line for block in code_of(text) for line in block.splitlines()]
        pieces += [line.strip() for line in text.splitlines() if line.startswith("    ")]
        for piece in pieces:
            words = re.split(r"\s{3,}(?!-)|\s#\s|`", piece)[0]
            if re.match(r"posttrain [a-z]+( |$)", words) and not words.endswith((".", ",", ":")):
                found.setdefault(words, f"{path.relative_to(ROOT)}: {words[:60]}")
    return [pytest.param(command, id=name) for command, name in found.items()]


@pytest.mark.parametrize("command", tool_commands())
def test_a_command_of_posttrain_in_the_documents_has_these_flags(command, capsys):
    _, name, *rest = without_placeholders(shlex.split(OPTIONAL.sub(r"\1", command)))
    assert name in cli.COMMANDS
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    if name == "run":
        if rest and rest[0] in MODULES:
            load(MODULES[rest[0]].Config, rest[1:])
        return
    of = [name, *rest[:1]] if name == "data" and rest else [name]
    with suppress(SystemExit):
        cli.main([*of, "--help"])
    said = capsys.readouterr().out
    assert said
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", said)]


def test_modules_and_scripts_that_the_documents_run_are_there():
    found = set()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"python -m (benchmarks\.\w+)", text))
        found |= set(re.findall(r"(?:python|sbatch[^`\n]*?) (scripts/[\w/]+\.\w+)", text))
    assert found
    paths = [name if "/" in name else name.replace(".", "/") + ".py" for name in found]
    assert not [path for path in paths if not (ROOT / path).is_file()]


def test_both_commands_stand_in_the_first_twenty_lines():
    top = README.read_text(encoding="utf-8").splitlines()[:20]
    assert any("make quickstart" in line for line in top)
    assert any("make test" in line for line in top)


def test_every_make_target_that_the_documents_name_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        code = "\n".join(code_of(path.read_text(encoding="utf-8")))
        named = set(re.findall(r"^\s*make ([a-z0-9-]+)", code, re.MULTILINE))
        assert named <= targets, path
    assert {"quickstart", "test"} <= targets


def test_the_python_of_readme_and_library_runs_as_it_stands(monkeypatch, tmp_path, capsys):
    """In a fresh folder, so that nothing is written into the checkout; and its reward rises."""
    text = README.read_text() + (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["readme"])
    torch.manual_seed(0)  # of the example's random weights
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    (printed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    rewards = ast.literal_eval(printed)
    assert len(rewards) == 3
    assert rewards[-1] > rewards[0]


def test_no_document_has_a_gap_to_fill_in():
    for path in DOCUMENTS:
        assert "<<" not in path.read_text(encoding="utf-8").replace("`<<", ""), path
