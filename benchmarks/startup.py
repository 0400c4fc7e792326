"""Measure the cost of a run before it trains, in CPU seconds of all threads and child processes.

    python -m benchmarks.startup

- `python recipes/dpo.py --help`;
- `recipes/dpo.py` on a tiny model that is there already and the shipped pairs, from the command to
  the beginning of its first step: all up to there, reference log-probs of all pairs included;
- `import posttrain.losses`, beyond what `import torch` takes.
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.harness import machine
from benchmarks.report import markdown
from benchmarks.workload import ROOT
from posttrain.run.options import option, parse, plain_errors

MODEL = ROOT / "models" / "startup"
# The recipe as its own program runs it, ended where the first step begins.
TO_FIRST_STEP = """
import os, sys
sys.path.insert(0, "recipes")
import dpo
from posttrain.run.options import parse
config = parse(dpo.Config)
from posttrain.trainers.base import PackedTrainer
PackedTrainer.training_step = lambda *_: os._exit(0)
dpo.main(config)
"""


@dataclass(kw_only=True)
class Config:
    """Settings of the start-up benchmark."""

    rounds: int = option(5, "times that each command is run; the median counts", at_least=1)
    output: str = option(str(ROOT), "folder of the results")


def cpu_seconds(*arguments: str) -> float:
    """Measure the user and system time of `python …` and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make_model() -> None:
    """Make the tiny model with the shipped tokenizer that the recipes start from."""
    if (MODEL / "config.json").is_file():
        return
    from transformers import AutoTokenizer, LlamaForCausalLM

    from posttrain.models.tiny import tiny_llama_config

    tokenizer = AutoTokenizer.from_pretrained("data/tiny_tokenizer")
    tokenizer.save_pretrained(MODEL)
    LlamaForCausalLM(tiny_llama_config(tokenizer)).save_pretrained(MODEL)


def main(config: Config) -> dict:
    """Measure all commands, print their medians, and return the report."""
    make_model()
    folder = Path(config.output) / "startup" / time.strftime("%Y%m%d-%H%M%S")
    commands = {
        "recipes/dpo.py --help": ("recipes/dpo.py", "--help"),
        "recipes/dpo.py to its first step": (
            "-c",
            TO_FIRST_STEP,
            "--model_name_or_path",
            str(MODEL),
            "--output_dir",
            str(folder / "run"),
        ),
        "import torch": ("-c", "import torch"),
        "import posttrain.losses": ("-c", "import posttrain.losses"),
    }
    runs: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(config.rounds):
        for name, arguments in commands.items():
            runs[name].append(cpu_seconds(*arguments))
    found = {name: median(seconds) for name, seconds in runs.items()}
    found["posttrain.losses beyond torch"] = (
        found["import posttrain.losses"] - found["import torch"]
    )
    report = {"config": asdict(config), "machine": machine(), "runs": runs, "cpu_seconds": found}
    folder.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".json").write_text(json.dumps(report, indent=1))
    print(markdown([("", "CPU s"), *((name, f"{s:.2f}") for name, s in found.items())]))
    return report


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
