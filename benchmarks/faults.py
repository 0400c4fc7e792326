"""The same faults on our SFT recipe and on TRL's SFTTrainer: what is saved, refused or noticed.

    python -m benchmarks.faults                     # minutes on two cores; prints a table

No measure of speed. Each row is one fault, made to a run of its own on the tiny base model; the
peer is TRL's SFTTrainer on the same model and data, by its defaults but for what the fault needs.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from posttrain.run.options import plain_errors, say

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "runs" / "base" / "model"
PEER = """
import sys, json
from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
out, model, data, steps, save, rate, resume = sys.argv[1:]
rows = load_dataset("json", data_files=data, split="train")
rows = rows.map(lambda r: {"prompt": r["instruction"], "completion": r["output"]},
                remove_columns=rows.column_names)
class Say(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        print("step", state.global_step, flush=True)
args = SFTConfig(output_dir=out, max_steps=int(steps), save_steps=int(save), use_cpu=True,
                 learning_rate=float(rate), per_device_train_batch_size=8, report_to=[],
                 disable_tqdm=True, logging_steps=1, bf16=False)
trainer = SFTTrainer(model, args, train_dataset=rows, callbacks=[Say()])
trainer.train(resume_from_checkpoint=resume == "True")
trainer.save_model(out + "/model")
"""


class Side:
    """How one side is started, and where it keeps things."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.data = folder / "data.jsonl"
        rows = (ROOT / "data" / "sft.jsonl").read_text(encoding="utf-8").splitlines(True)
        self.data.write_text("".join(rows[:200]), encoding="utf-8")
        self.model = folder / "start"
        shutil.copytree(MODEL, self.model)

    def command(
        self, *, steps: int, save: int = 1000, rate: float = 1e-4, resume: bool = False
    ) -> list[str]:
        """Return the command line of a run."""
        if self.name == "posttrain":
            flags = {
                "output_dir": self.out,
                "model_name_or_path": self.model,
                "dataset": self.data,
                "max_steps": steps,
                "save_steps": save,
                "learning_rate": rate,
                "resume": resume,
                "per_device_train_batch_size": 8,
                "logging_steps": 1,
            }
            words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
            return [sys.executable, "recipes/sft.py", *words]
        words = map(str, (self.out, self.model, self.data, steps, save, rate, resume))
        return [sys.executable, "-c", PEER, *words]

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.folder / "out"

    def start(self, **settings: object) -> subprocess.Popen:
        """Start a run and wait for its third step."""
        run = subprocess.Popen(
            self.command(**settings), cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        for line in run.stdout:
            if line.startswith("step 3"):
                break
        return run

    def run(self, **settings: object) -> subprocess.CompletedProcess:
        """Run to the end."""
        return subprocess.run(
            self.command(**settings), cwd=ROOT, capture_output=True, text=True, check=False
        )

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints."""
        return sorted(path.name for path in self.out.rglob("checkpoint-*"))


def stopped(name: str) -> Callable[[Side], str]:
    """Return the fault of a signal after the third step."""

    def fault(side: Side) -> str:
        with side.start(steps=3000) as run:
            run.send_signal(signal.Signals[name])
            run.stdout.read()
            run.wait(60)
        saved = f"saves {', '.join(side.checkpoints())}" if side.checkpoints() else "loses all"
        return f"{saved}, status {run.returncode}"

    return fault


def deaf(side: Side) -> str:
    """Close the reader of stdout after the third step."""
    with side.start(steps=12) as run:
        run.stdout.close()
        run.wait(120)
    return "ends well" if (side.out / "model").is_dir() else f"dies, status {run.returncode}"


def twice(side: Side) -> str:
    """Start a second run into the folder of a live one."""
    with side.start(steps=3000) as run:
        second = side.run(steps=2)
        run.kill()
    return "refused" if second.returncode == 2 else f"runs, status {second.returncode}"


def lacking(side: Side) -> str:
    """Take a weight out of the model's file."""
    from safetensors.torch import load_file, save_file

    path = side.model / "model.safetensors"
    weights = load_file(path)
    weights.pop("model.layers.0.mlp.down_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    done = side.run(steps=1)
    return "refused by name" if done.returncode == 2 else f"trains, status {done.returncode}"


def exploding(side: Side) -> str:
    """Take a step so large that the weights are not finite."""
    done = side.run(steps=1, save=1, rate=1e38)
    kept = side.checkpoints() + (["model"] if (side.out / "model").is_dir() else [])
    return f"saves {', '.join(kept)}, status {done.returncode}" if kept else "nothing is saved"


def other_data(side: Side) -> str:
    """Change the data behind the same path between a stop and the resume."""
    side.run(steps=4, save=2)
    shutil.rmtree(side.out / "model")
    lines = side.data.read_text(encoding="utf-8").splitlines(True)
    side.data.write_text("".join(lines[::-1]), encoding="utf-8")
    done = side.run(steps=6, save=2, resume=True)
    return "refused" if done.returncode == 2 else f"resumes, status {done.returncode}"


def damaged(side: Side) -> str:
    """Flip a bit in the middle of the newest checkpoint's weights."""
    side.run(steps=4, save=2)
    shutil.rmtree(side.out / "model")
    (path,) = side.out.rglob("checkpoint-4/model.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    done = side.run(steps=6, save=2, resume=True)
    noticed = "checkpoint-4" in done.stdout and "changed after it was saved" in done.stdout
    return "noticed, takes the one before" if noticed else f"resumes, status {done.returncode}"


FAULTS = {
    "SIGTERM after step 3": stopped("SIGTERM"),
    "SIGINT after step 3": stopped("SIGINT"),
    "SIGHUP after step 3": stopped("SIGHUP"),
    "stdout's reader goes away": deaf,
    "a second start into the folder": twice,
    "a weight is missing in the start": lacking,
    "a learning rate of 1e38": exploding,
    "other data at the resume": other_data,
    "a flipped bit in the newest checkpoint": damaged,
}


def main() -> dict[str, dict[str, str]]:
    """Make every fault on both sides, print the table, and return it."""
    table: dict[str, dict[str, str]] = {}
    for fault, make in FAULTS.items():
        table[fault] = {}
        for name in ("posttrain", "TRL"):
            with tempfile.TemporaryDirectory() as folder:
                start = time.monotonic()
                table[fault][name] = make(Side(name, Path(folder)))
                took = time.monotonic() - start
            say(f"{fault:42}{name:12}{table[fault][name]}  ({took:.0f} s)")
    say(json.dumps(table, indent=1))
    return table


if __name__ == "__main__":
    with plain_errors():
        main()
