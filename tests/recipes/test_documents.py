"""Each command and each piece of Python in the documents is tried, or has a reason not to be.

`PROGRAMS` has a function for each program that the documents start. It runs the command on tiny
models in a folder made for it, or parses it and says why no more; a command that it does not know
fails. tests/recipes/test_readme.py parses those that stand in prose and in the recipes' headers.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from benchmarks import real_run
from posttrain import cli
from posttrain.commands import evaluate, plan, report
from posttrain.errors import ConfigError
from posttrain.models.tiny import tiny_llama_config
from posttrain.run.options import load, parse
from tests.recipes.conftest import ROOT, TOKENIZER
from tests.recipes.test_readme import MODULES

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"),
                ROOT / "recipes/README.md", ROOT / "data/README.md"])  # fmt: skip
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4,}.*\n)+")
SHELL_TAGS = {"bash", "sh", "shell", "console"}

# Programs that no document starts today. A new one fails until PROGRAMS says how it is checked.
UNCHECKED = {"bash", "cd", "conda", "curl", "docker", "export", "git", "huggingface-cli",
             "llama-cli", "ollama", "ray", "sh", "srun", "tensorboard", "torchrun", "uv",
             "wget"}  # fmt: skip


class Block(NamedTuple):
    page: str
    tag: str
    text: str


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """Blocks between fences, and indented ones after an empty line."""
    for tag, block in FENCED.findall(text):
        yield Block(page, tag, block)
    for block in INDENTED.findall(FENCED.sub("", text)):
        indent = min(len(line) - len(line.lstrip()) for line in block.splitlines() if line.strip())
        yield Block(page, "", "".join(line[indent:] for line in block.splitlines(True)))


def words_of(line: str) -> list[str]:
    """Words of a command without the remark behind it and the variables before it."""
    line = re.split(r"\s+#\s", line)[0]
    words = shlex.split(line.strip().removeprefix("$ "))
    while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
        words.pop(0)
    return words


def program(line: str) -> str:
    """Return the first word of a line, without its folder and variables; '' if it has none."""
    try:
        words = words_of(line)
    except ValueError:  # a quotation mark that does not close: prose or code
        return ""
    return Path(words[0]).name if words and not line.startswith((" ", "#")) else ""


def commands_of(block: Block) -> list[list[str]]:
    """Commands of a shell block; nothing of another block. Lines that end in \\ go on."""
    lines = [line for line in re.sub(r"\s*\\\n\s*", " ", block.text).splitlines() if line.strip()]
    known = {*PROGRAMS, *UNCHECKED}
    if block.tag not in SHELL_TAGS and not (block.tag == "" and program(lines[0]) in known):
        return []
    return [words for line in lines if (words := words_of(line))]


# Recipes that compute before they could say anything; and flags of servers, of models that write or
# judge before the first step, or of a family that the tiny models are not.
LONG = {"r1", "long2short", "self_instruct", "quickstart"}
ELSEWHERE = {
    "--own_completions",
    "--report_to",
    "--teacher_url",
    "my/teacher",
    "my/Qwen3-VL",
    "my_judge.yaml",
    "runs/prm/model",
}
SMALL = {
    "dry_run": True, "output_dir": "runs/dry", "eval_dataset": None, "eval_steps": 0,
    "max_steps": 8, "trainer": {}, "dtype": "float32", "max_length": 512, "max_prompt_length": 256,
    "max_completion_length": 64,
}  # fmt: skip

# How each program is checked ------------------------------------------------------------------


def flags_after(words: list[str], count: int) -> list[str]:
    """Words from `count` on, without gaps to be filled in such as …"""
    return [word for word in words[count:] if word != "…"]


def check_recipe(words: list[str]) -> None:
    """Parse the flags, then say what the run would do, with tiny models and few rows.

    The dry run is left out where a recipe has none, a flag needs what is not here, or the same
    recipe has been tried with flags that load the same things.
    """
    name, flags = Path(words[0]).stem, flags_after(words, 1)
    recipe = MODULES[name]
    if flags == ["--help"]:
        with pytest.raises(SystemExit):
            parse(recipe.Config, flags)
        return
    with patch("posttrain.run.settings.check_trackers"), patch("posttrain.run.hub.check_push"):
        config = load(recipe.Config, flags)
    if not hasattr(config, "dry_run") or name in LONG or ELSEWHERE & set(flags):
        return
    config = dataclasses.replace(config, **{k: v for k, v in SMALL.items() if hasattr(config, k)})
    if not Path(config.model_name_or_path).is_dir():
        config.model_name_or_path = "my/model"
    if not Path(config.dataset).is_file():  # a name on the Hub
        config.dataset = recipe.Config().dataset
    config.dataset = re.sub("^data/", "few/", config.dataset)
    recipe.main(config)


def check_python(words: list[str]) -> None:
    """Parse a recipe, a benchmark or a script; a test suite is not started from within itself."""
    if words[1] == "-m" and words[2] == "pytest":
        assert all(Path(word).exists() for word in words[3:] if word.startswith("tests/"))
    elif words[1] == "-m":
        module = importlib.import_module(words[2])
        if settings := getattr(module, "Config", None):
            load(settings, words[3:])
    elif words[1].startswith("recipes/"):
        check_recipe(words[1:])
    else:
        script = Path(words[1]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in script for word in words[2:] if word.startswith("--")), words


def check_accelerate(words: list[str]) -> None:
    """Parse what the launcher takes, then the recipe's flags. Several machines are not to hand."""
    from accelerate.commands.launch import launch_command_parser

    place = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
    arguments = launch_command_parser().parse_args([*flags_after(words[:place], 2), words[place]])
    assert arguments.config_file is None or Path(arguments.config_file).is_file()
    check_recipe(words[place:])


def check_sbatch(words: list[str]) -> None:
    """Parse what scripts/slurm.sh starts; tests/scripts/test_slurm.py runs it."""
    place = words.index("scripts/slurm.sh")
    assert Path(words[place]).is_file()
    assert Path(words[place + 1]).is_file()
    check_recipe(words[place + 2 :])


def check_make(words: list[str]) -> None:
    """Look for the target. They install, or train for minutes."""
    targets = re.findall(r"^([a-z0-9-]+):", Path("Makefile").read_text(), re.MULTILINE)
    assert words[1] in targets


def check_pip(words: list[str]) -> None:
    """Look for the extra in pyproject.toml: nothing is installed by a test."""
    (extra,) = re.findall(r"\[(\w+)\]", words[-1])
    assert re.search(rf"^{extra} = \[", Path("pyproject.toml").read_text(), re.MULTILINE)


def check_ruff(words: list[str]) -> None:
    """Accept `ruff format .`, which would change the checkout."""
    assert words[1:] == ["format", "."]


def check_vllm(words: list[str]) -> None:
    """Compare with what an error tells people to type: vLLM needs a GPU, and is not installed."""
    from posttrain.rollouts.vllm import FOLDER_COMMAND, SERVER_COMMAND

    commands = [
        words_of(re.sub(r"\s*\\\n\s*", " ", text)) for text in (SERVER_COMMAND, FOLDER_COMMAND)
    ]
    assert words in commands


def check_kill(words: list[str]) -> None:
    """Accept the signal that runs take; tests/trainers/test_stops.py sends it."""
    assert words == ["kill", "-TERM", "PID"]


def check_hf(words: list[str]) -> None:
    """Accept what needs an account: tests/run/test_hub.py plays the Hub."""
    assert words[1:3] in (["auth", "login"], ["upload", "me/my-model"])


def check_source(words: list[str]) -> None:
    """Accept the environment that make creates."""
    assert words[1] == ".venv/bin/activate"


def run_here(words: list[str]) -> None:
    cli.main(words[1:])


def check_run(words: list[str]) -> None:
    check_recipe(words[2:])


def check_plan(words: list[str]) -> None:
    """Plan for the tiny model: the config's own is on the Hub."""
    plan.main([*words[2:], "--model_name_or_path", "runs/sft/model"])


def check_generate(words: list[str]) -> None:
    run_here([*words, "--max_completion_length", "4"])


def check_evaluate(words: list[str]) -> None:
    """Parse: hundreds of problems take too long here; tests/commands/test_evaluate.py runs it."""
    load(evaluate.Config, ["--model", *words[2:]])


def check_compare(words: list[str]) -> None:
    """Parse: runs have to be trained first; tests/report/test_compare.py compares two."""
    config = load(report.CompareConfig, ["--runs", *words[2:]])
    assert len(config.runs) > 1


POSTTRAIN: dict[str, Callable[[list[str]], None]] = {
    "verify": run_here, "data": run_here, "chat": run_here, "export": run_here, "env": run_here,
    "recipes": run_here, "generate": check_generate, "run": check_run, "plan": check_plan,
    "evaluate": check_evaluate, "compare": check_compare,
}  # fmt: skip


def check_posttrain(words: list[str]) -> None:
    POSTTRAIN[words[1]](words)


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python, "accelerate": check_accelerate, "posttrain": check_posttrain,
    "make": check_make, "pip": check_pip, "sbatch": check_sbatch, "vllm": check_vllm,
    "ruff": check_ruff, "kill": check_kill, "hf": check_hf, "source": check_source,
}  # fmt: skip

SHELL = [
    pytest.param(words, id=f"{block.page}: {shlex.join(words)[:60]}")
    for path in PAGES
    for block in blocks_of(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    for words in commands_of(block)
]


# Files that the documents call a reader's own: the shipped file of the same kind.
OWN = {"my/pairs.jsonl": "preferences", "my/gsm8k.jsonl": "problems", "my/problems.jsonl":
       "problems", "my/prompts.jsonl": "problems", "my_thumbs.jsonl": "preferences"}  # fmt: skip
TEXTS = {
    "my.yaml": "seed: 1\n",
    "my_rewards.py": "def my_reward(completions, **columns):\n    return [1.0]\n",
    "prompts.txt": "What is 2 + 2?\n",
}
MODELS = {
    **dict.fromkeys(("runs/base/model", "runs/sft/model", "runs/dpo/model", "my/model"),
                    LlamaForCausalLM),
    "runs/reward_model/model": LlamaForSequenceClassification,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with tiny models and the files that the documents call a reader's own."""
    folder = tmp_path_factory.mktemp("documents") / "checkout"
    folder.mkdir()
    for name in ("recipes", "accelerate_configs", "data", "scripts", "tests", "Makefile",
                 "pyproject.toml"):  # fmt: skip
        (folder / name).symlink_to(ROOT / name)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    settings = tiny_llama_config(tokenizer, hidden_size=32)
    settings.num_labels = 1
    for name, kind in MODELS.items():
        torch.manual_seed(0)
        kind(settings).save_pretrained(folder / name)
        if name == "my/model":
            tokenizer.chat_template = (
                "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
            )
        tokenizer.save_pretrained(folder / name)
    few = {path.stem: path.read_text(encoding="utf-8").splitlines(True)[:200]
           for path in (ROOT / "data").glob("*.jsonl")}  # fmt: skip
    (folder / "few").mkdir()
    for name, rows in few.items():
        (folder / f"few/{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    for name, shipped in OWN.items():
        (folder / name).symlink_to(folder / f"few/{shipped}.jsonl")
    rows = (ROOT / "data/sft.jsonl").read_text(encoding="utf-8").splitlines(True)[:40]
    (folder / "gsm8k").mkdir()
    for name in ("my.jsonl", "a.jsonl", "b.jsonl", "gsm8k/test.jsonl"):
        (folder / name).write_text("".join(rows), encoding="utf-8")
    for name in ("alpaca.json", "my/alpaca.json"):
        (folder / name).write_text(json.dumps([json.loads(row) for row in rows]))
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("../gsm8k/train.jsonl", "../gsm8k/test.jsonl", real_run.MODEL,
                 "../hh_rlhf/harmless-base-test.jsonl.gz"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("words", SHELL)
def test_a_command_of_the_documents_works(words, folder, monkeypatch):
    """In their order: what one writes another may read. A file is written once."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError()))
    name = Path(words[0]).name
    assert name in PROGRAMS, f"say in PROGRAMS how {name} is checked"
    for flag in ("--output", "--output_dir"):  # two documents may write the same file
        if flag in words and (written := folder / words[words.index(flag) + 1]).exists():
            written.rename(written.with_name(f"{written.name}.before"))
    PROGRAMS[name](words)


@pytest.mark.parametrize("line", ["python recipes/sft.py --learning_rat 1", "make cofee",
                                  "posttrain data chek --dataset my.jsonl", "pip install 'p[x]'",
                                  "vllm serve MODEL",
                                  "python scripts/mutate.py --onyl kl"])  # fmt: skip
def test_a_command_with_a_mistake_is_found(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = words_of(line)
    with pytest.raises((ConfigError, AssertionError, SystemExit, ValueError)):
        PROGRAMS[words[0]](words)


def test_a_verdict_that_a_document_shows_is_the_one_that_is_printed(capsys):
    lines = [line for path in PAGES for line in path.read_text(encoding="utf-8").splitlines()]
    shown = [line for line in lines if re.match(r"\s*posttrain verify .*# [01]\b", line)]
    assert shown
    for line in shown:
        run_here(words_of(line))
        assert capsys.readouterr().out.startswith(line.rpartition("# ")[2][:1])


def test_the_shell_blocks_of_a_page_are_found_and_others_are_not():
    page = """
```
stage   accuracy
```

    A=1 make it \\
        so   # a remark

```bash
unheard of
```

    ollama run it

```python
python = 1
```
"""
    found = [command for block in blocks_of("page", page) for command in commands_of(block)]
    assert found == [["unheard", "of"], ["make", "it", "so"], ["ollama", "run", "it"]]


# Python ---------------------------------------------------------------------------------------

IMPORTS = re.compile(r"^\s*(from posttrain|import posttrain)", re.MULTILINE)
PYTHON = [
    pytest.param(block.text, id=f"{block.page}: {block.text.splitlines()[0][:50]}")
    for path in PAGES
    for block in blocks_of(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    if block.tag == "python" or (block.tag == "" and IMPORTS.search(block.text))
]
# Needs nothing that the reader has to bring, and starts no training: it is run.
ALONE = ("from posttrain.losses import dpo_loss", "from posttrain.sandbox import")


@pytest.mark.parametrize("code", PYTHON)
def test_the_python_of_the_documents_compiles_and_names_what_there_is(code):
    """Imports are done, and calls of what they bring have the parameters that are named."""
    tree = ast.parse(textwrap.dedent(code))
    brought: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), brought)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = brought.get(getattr(call.func, "id", ""))
        if function is not None:
            keywords = {word.arg: None for word in call.keywords if word.arg}
            if function is not functools.partial:  # has no signature
                inspect.signature(function).bind_partial(*call.args, **keywords)
    if any(start in code for start in ALONE):
        exec(compile(tree, "document", "exec"), {})
