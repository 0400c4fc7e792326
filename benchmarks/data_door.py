"""Measure what it costs to turn a file of questions and answers into examples for training.

    python -m benchmarks.data_door --data gsm8k/train.jsonl                    100,000 rows
    python -m benchmarks.data_door --data gsm8k/train.jsonl --rows 1000000 --steps 20 --no_peer

The rows are those of the file, again and again, each time with other names and numbers. Both sides
get the same prompts and completions, without a template. Ours is measured twice, without and with
what the first start left behind; TRL is SFTTrainer's preparation of a dataset that is loaded
already, with each number of processes, of which the best counts. Each run is a process of its own
with a cache of its own. CPU seconds are those of all threads and child processes; memory is the
high-water mark of the process beyond what it holds after its imports, and for TRL with several
processes that of the main one alone. With --steps our side trains, and its whole memory is given.
"""

import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.child import Job
from benchmarks.harness import ChildError, machine
from benchmarks.measure import peak_gigabytes
from benchmarks.ours import settings
from benchmarks.report import markdown
from benchmarks.workload import ROOT, SIZES, model_folder
from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors

NAMES = (
    "Amara",
    "Ben",
    "Chloe",
    "Dev",
    "Emeka",
    "Farah",
    "Goro",
    "Hana",
    "Ivo",
    "Juan",
    "Kofi",
    "Lena",
)
MAX_LENGTH = 512
COMPARED = 1000  # rows of which both sides' token ids are compared
LEAST_EQUAL = 0.99  # share of them; TRL tokenises prompt and completion together, ours apart
BATCH_SIZE = 16


@dataclass(kw_only=True)
class Config:
    """Settings of the benchmark of data preparation."""

    data: str = option("gsm8k/train.jsonl", "JSONL file with columns question and answer")
    rows: int = option(100_000, "rows to make of it", at_least=1)
    steps: int = option(0, "optimizer steps that ours trains afterwards, a tiny model", at_least=0)
    rounds: int = option(3, "measured runs of each side, in alternation", at_least=1)
    peer: bool = option(True, "measure TRL too")
    processes: tuple[int, ...] = option((1, 2), "numbers of TRL's processes to try")
    output: str = option(str(ROOT), "folder of the results")

    def check(self) -> None:
        """Raise ConfigError where the file is missing."""
        if not Path(self.data).is_file():
            raise ConfigError(f"data: expected a file, found none at {self.data}.")


def write_rows(source: Path, count: int, path: Path) -> None:
    """Write `count` rows that differ: names before the question, numbers moved by a few."""
    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    dice = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for place in range(count):
            row, turn = rows[place % len(rows)], place // len(rows)
            moved = partial(re.sub, r"\d+", lambda number, by=turn: str(int(number[0]) + by))
            question, answer = moved(row["question"]), re.sub("<<.*?>>", "", row["answer"])
            asked = f"{dice.choice(NAMES)} asks: {question}"
            file.write(json.dumps({"question": asked, "answer": moved(answer)}) + "\n")


def cpu_seconds() -> float:
    """Return the user and system time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


class Meter:
    """CPU seconds and memory from here on."""

    def __init__(self) -> None:
        self.cpu, self.wall, self.imports = cpu_seconds(), time.perf_counter(), peak_gigabytes()

    def read(self, ids: Any) -> dict[str, Any]:
        """Return what was used since, and the first token ids."""
        return {
            "cpu_seconds": cpu_seconds() - self.cpu,
            "wall_seconds": time.perf_counter() - self.wall,
            "peak_gb": peak_gigabytes() - self.imports,
            "ids": [list(row) for row in ids[:COMPARED]],
        }


def ours(job: Job) -> dict[str, Any]:
    """Prepare the rows as recipes/sft.py does, and train if steps are asked for."""
    from posttrain.data import load_documents
    from posttrain.losses import nll_loss
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.sft import SFTTrainer

    tokenizer = load_tokenizer(job.model)
    import datasets  # noqa: F401  (an import, which does not count)

    meter = Meter()
    documents = load_documents(job.data, tokenizer, template="plain", max_length=MAX_LENGTH)
    found = meter.read(documents["input_ids"])
    if job.steps:
        config = settings(job, output_dir=str(Path(job.folder) / "run"))
        trainer = SFTTrainer(
            load_model(config),
            training_arguments(config),
            documents=documents,
            tokenizer=tokenizer,
            loss=nll_loss,
        )
        fit(trainer, config)
        found |= {"trained_cpu_seconds": cpu_seconds() - meter.cpu, "whole_gb": peak_gigabytes()}
    return found


def peer(job: Job) -> dict[str, Any]:
    """Let TRL's SFTTrainer prepare the rows."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    from benchmarks.peer import arguments, load_causal, load_tokenizer

    model, tokenizer = load_causal(job), load_tokenizer(job)
    rows = datasets.load_dataset("json", data_files=job.data, split="train")
    rows = rows.rename_columns({"question": "prompt", "answer": "completion"})
    processes = {"dataset_num_proc": job.setting["processes"]}
    config = arguments(SFTConfig, job, max_length=MAX_LENGTH, **processes)
    meter = Meter()
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    return meter.read(trainer.train_dataset["input_ids"])


def run_child(job: Job, cache: Path) -> dict[str, Any]:
    """Run a job in a process of its own, with a cache of datasets of its own."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache),
    }
    path = job.save()
    command = [sys.executable, "-m", "benchmarks.child", str(path)]
    with path.with_name("output.txt").open("w") as output:
        child = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if child.returncode:
        tail = path.with_name("output.txt").read_text()[-2000:]
        raise ChildError(f"{job.function} {job.setting} failed; see {path.parent}:\n{tail}")
    return json.loads(path.with_name("result.json").read_text())


def measure(config: Config, folder: Path) -> dict[str, list[dict]]:
    """Run every side once in each round, one after the other."""
    data, size = folder / "rows.jsonl", SIZES["tiny" if config.steps else "small"]
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(Path(config.data), config.rows, data)
    model = str(model_folder(size, config.data))
    sides: dict[str, tuple[str, dict]] = {"ours": ("ours", {}), "ours again": ("ours", {})}
    if config.peer:
        for count in config.processes:
            name = f"TRL, {count} process" + "es" * (count > 1)
            sides[name] = ("peer", {"processes": count if count > 1 else None})
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for number in range(config.rounds):
        for name, (function, setting) in sides.items():
            place = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{number}"
            again = name == "ours again"
            job = Job(
                function=f"benchmarks.data_door:{function}",
                setting=setting,
                model=model,
                data=str(data),
                folder=str(place),
                dtype="float32",
                batch_size=BATCH_SIZE,
                steps=config.steps,
                warmup_steps=0,
            )
            cache = folder / f"ours-{number}" / "cache" if again else place / "cache"
            runs[name].append(run_child(job, cache))
            print(f"round {number + 1}  {name}: {_shown(runs[name][-1])}", flush=True)
    return runs


def _shown(run: dict) -> str:
    text = f"{run['cpu_seconds']:.2f} CPU s, {run['peak_gb']:.3f} GB above the imports"
    if "whole_gb" in run:
        text += (
            f"; trained: {run['trained_cpu_seconds']:.1f} CPU s, {run['whole_gb']:.2f} GB in all"
        )
    return text


def main(config: Config) -> dict:
    """Measure, print the medians, and return the report."""
    folder = Path(config.output).absolute() / "data_door" / time.strftime("%Y%m%d-%H%M%S")
    runs = measure(config, folder)
    first = runs["ours"][0]["ids"]
    equal = {
        name: sum(a == b for a, b in zip(first, found[0]["ids"], strict=True)) / len(first)
        for name, found in runs.items()
    }
    if min(equal.values()) < LEAST_EQUAL or equal["ours again"] < 1:
        raise ChildError(f"the sides made other token ids; share of equal rows: {equal}")
    for run in [run for found in runs.values() for run in found]:
        del run["ids"]
    medians = {
        name: {quantity: median(run[quantity] for run in found) for quantity in found[0]}
        for name, found in runs.items()
    }
    rows = [("", "CPU s", "of the best of TRL", "GB above the imports")]
    peers = [found["cpu_seconds"] for name, found in medians.items() if name.startswith("TRL")]
    for name, found in medians.items():
        share = f"{found['cpu_seconds'] / min(peers):.2f}" if peers else ""
        rows.append((name, f"{found['cpu_seconds']:.2f}", share, f"{found['peak_gb']:.3f}"))
    versions = {name: version(name) for name in ("datasets", "tokenizers", "pyarrow")}
    report = {
        "config": asdict(config),
        "machine": {**machine(), **versions},
        "equal_rows": equal,
        "runs": runs,
        "medians": medians,
    }
    folder.with_suffix(".json").write_text(json.dumps(report, indent=1))
    print(f"\n{markdown(rows)}\nwritten to {folder}.json")
    for name, found in medians.items():
        print(f"{name}: {_shown(found)}")
    return report


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
