"""A wheel holds what a checkout holds: recipes run from it in an empty folder, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from posttrain.models.tiny import tiny_llama_config

ROOT = Path(__file__).parents[1]
NEEDED = ("posttrain", "recipes", "data", "accelerate_configs", "pyproject.toml", "setup.py",
          "MANIFEST.in", "README.md", "LICENSE")  # fmt: skip
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
RUN = """
import posttrain
from posttrain.cli import main
print("PACKAGE", posttrain.__file__)
few = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1"]
main(["run", "sft", *few, "--learning_rate", "1e-3"])
main(["run", "dpo", *few, "--beta", "0.5"])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel of this checkout, unpacked as an installer does it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(source / "dist" / done.stdout.split()[-1]) as wheel:
        wheel.extractall(target)
    return target


def test_it_ships_every_recipe_config_and_data_file(installed):
    for name in ("recipes", "data", "accelerate_configs"):
        kept = {p.relative_to(ROOT) for p in (ROOT / name).rglob("*") if p.is_file()}
        shipped = installed / "posttrain" / "_shipped"
        found = {p.relative_to(shipped) for p in (shipped / name).rglob("*") if p.is_file()}
        assert found == {path for path in kept if "__pycache__" not in path.parts}


def test_sft_and_dpo_run_in_an_empty_folder(installed, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_tokenizer")
    start = tmp_path / "runs" / "base" / "model"
    LlamaForCausalLM(tiny_llama_config(tokenizer)).save_pretrained(start)
    tokenizer.save_pretrained(start)
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"PACKAGE {installed}" in done.stdout
    for recipe in ("sft", "dpo"):
        folder = tmp_path / "runs" / recipe
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "loss" in line] == [1, 2]
        assert (folder / "model" / "model.safetensors").is_file()
        inputs = json.loads((folder / "env.json").read_text())["inputs"]
        assert Path(inputs["dataset"]["path"]).is_relative_to(installed)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
