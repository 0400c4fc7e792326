"""Recipes as users start them: real processes, real launcher, a quiet screen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.conftest import ROOT, Run

# What our own programs set for themselves; a user's shell has none of it.
OURS = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM",
        "HF_DATASETS_DISABLE_PROGRESS_BARS", "DS_ACCELERATOR", "THP_MEM_ALLOC_ENABLE")  # fmt: skip
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TIMEOUT_SECONDS = 240


def start(command: list[str], **environment: str) -> list[str]:
    """Run a command in the root of the checkout; its lines. It must succeed and say nothing else.

    Nothing else: no line on stderr, whoever writes it.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env={**inherited, **alone, **environment}, capture_output=True,
        text=True, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def recipe(name: str, folder: Path, base_run: Run, *flags: str) -> list[str]:
    common = ["--output_dir", str(folder), "--model_name_or_path", base_run.model]
    return [f"recipes/{name}.py", "--max_steps", "2", "--logging_steps", "1", *common, *flags]


def check_run(folder: Path, lines: list[str], *, world_size: int) -> list[dict]:
    """What every finished run leaves; returns its log records."""
    assert json.loads((folder / "env.json").read_text())["world_size"] == world_size
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token_id == 0
    AutoModelForCausalLM.from_pretrained(folder / "model")
    assert [line.split("  ")[0] for line in lines if line.startswith("step ")] == [
        "step 1/2",
        "step 2/2",
    ]
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "loss" in record]


def test_a_plain_python_run_is_quiet_and_whole(base_run, first_rows, tmp_path):
    folder = tmp_path / "sft"
    command = recipe("sft", folder, base_run, "--dataset", first_rows("sft", 16))
    lines = start([sys.executable, *command])
    check_run(folder, lines, world_size=1)
    ours = ["first", "model", "model", "report", "step", "step"]  # and the line about the data
    assert sorted(line.split()[0] for line in lines if "/sft.jsonl: " not in line) == ours
    assert len(lines) == len(ours) + 1


def test_accelerate_launch_on_the_cpu_is_quiet_and_whole(base_run, first_rows, tmp_path):
    folder = tmp_path / "r1_zero"
    command = recipe(
        "r1_zero", folder, base_run, "--dataset", first_rows("problems", 8),
        "--num_generations", "2", "--per_device_train_batch_size", "4",
        "--max_completion_length", "8",
    )  # fmt: skip
    lines = start([*LAUNCH, "--config_file", "accelerate_configs/cpu.yaml", *command])
    check_run(folder, lines, world_size=1)
    assert (folder / "samples.jsonl").is_file()


@pytest.fixture(scope="module")
def zero3(base_run, first_rows, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("zero3") / "dpo"
    command = recipe(
        "dpo", folder, base_run, "--dataset", first_rows("preferences", 16),
        "--per_device_train_batch_size", "2",
    )  # fmt: skip
    config = ["--config_file", "accelerate_configs/zero3.yaml", "--num_processes", "2"]
    # The launcher looks at DeepSpeed before a recipe can tell it that there is no GPU.
    lines = start([*LAUNCH, *config, "--main_process_port", "0", *command], DS_ACCELERATOR="cpu")
    return folder, lines


def test_zero3_runs_on_two_ranks_and_saves_a_whole_model(zero3, base_run):
    folder, lines = zero3
    check_run(folder, lines, world_size=2)
    start_weights = AutoModelForCausalLM.from_pretrained(base_run.model).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert {name: w.shape for name, w in saved.items()} == {
        name: w.shape for name, w in start_weights.items()
    }
    assert any(not weight.equal(start_weights[name]) for name, weight in saved.items())


def test_zero3_computes_the_reference_once_and_starts_at_log_two(zero3):
    folder, lines = zero3
    said = "reference log-probs of 16 rows, once, before the first step"
    assert sum(said in line for line in lines) == 1
    assert (folder / "checkpoints" / "reference.safetensors").is_file()
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
