"""Soak: random kills of every kind of run, and a thousand RL steps with their memory.

    make soak                                       # an hour or two on two cores
    python scripts/soak.py --kills 20 --rl_steps 200 --output_dir /tmp/soak

Kills: tiny runs are started with --resume and stopped by a random signal (SIGKILL half of the time)
after a random time, again and again until they finish; the weights at the end must be those of the
run that nobody stopped, and each step must be in the log once. RL: one run with maths and code
rewards; the resident memory of the trainer and of its workers after step 100 and at the end may
differ by 5 %, and descriptors, processes and temporary files must not grow. Writes soak.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from posttrain.run.folder import read_log
from posttrain.run.options import option, parse, plain_errors, say

ROOT = Path(__file__).parents[1]
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT,
           signal.SIGHUP]  # fmt: skip
STEPS, SAVE_STEPS = 24, 3
COMMON = ["--max_steps", str(STEPS), "--save_steps", str(SAVE_STEPS), "--logging_steps", "1"]
RL = ["--num_generations", "4", "--per_device_train_batch_size", "16", "--rollout", "hf"]
RUNS = {
    "sft": ["sft", "--per_device_train_batch_size", "8"],
    "sft_lora": ["sft", "--per_device_train_batch_size", "8", "--use_peft"],
    "dpo": ["dpo", "--per_device_train_batch_size", "4"],
    "reward_model": ["reward_model", "--per_device_train_batch_size", "4"],
    "r1_zero": ["r1_zero", *RL],
    "grpo": ["grpo", *RL, "--updates_per_rollout", "3", "--beta", "0.01"],
}
MARK = "POSTTRAIN_SOAK"  # in the environment of whatever a soak starts
FLAT = 1.05  # largest growth of memory after step WARM
WARM = 100


@dataclass(kw_only=True)
class Config:
    """Settings of the soak."""

    kills: int = option(200, "number of kills, over all kinds of run", at_least=0)
    rl_steps: int = option(1000, "steps of the RL run whose memory is watched", at_least=0)
    seed: int = option(0, "seed of signals and moments", at_least=0)
    output_dir: str = option("runs/soak", "folder of the runs and of soak.json")


def command(kind: str, folder: Path) -> list[str]:
    """Return the command line of a run."""
    recipe, *flags = RUNS[kind]
    return [sys.executable, f"recipes/{recipe}.py", *flags, *COMMON, "--output_dir", str(folder)]


def digest(folder: Path) -> str:
    """Return the SHA-256 of the saved weights."""
    (weights,) = (folder / "model").glob("*model.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def children() -> set[str]:
    """Return the process ids and command lines of all that this soak started, near or far."""
    mark, found = f"{MARK}={os.getpid()}".encode(), set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            marked = mark in (path / "environ").read_bytes().split(b"\0")
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if marked and int(path.name) != os.getpid() and any(words):
            found.add(f"{path.name} {b' '.join(words).decode(errors='replace')[:80]}")
    return found


def wait_until_gone() -> set[str]:
    """Wait up to five seconds; return the processes that are still there."""
    for _ in range(50):
        if not (left := children()):
            return set()
        time.sleep(0.1)
    return left


def kill_run(kind: str, folder: Path, seconds: float, draw: random.Random) -> str | None:
    """Start or resume a run and stop it at a random moment; return the signal, None if it ended."""
    with subprocess.Popen(
        [*command(kind, folder), "--resume"], cwd=ROOT, stdout=subprocess.DEVNULL
    ) as run:
        try:
            if run.wait(draw.uniform(0.2, 1.0) * seconds):
                raise RuntimeError(f"{kind} ended with status {run.returncode}")
        except subprocess.TimeoutExpired:
            number = draw.choice(SIGNALS)
            run.send_signal(number)
            run.wait(60)
            return number.name
    return None


def soak_kills(config: Config, folder: Path) -> dict:
    """Kill runs of every kind until there were enough kills; return what was counted."""
    draw, report = random.Random(config.seed), {"kills": 0, "runs": 0, "differ": [], "left": []}
    whole, seconds = {}, {}
    for kind in RUNS:
        start = time.monotonic()
        subprocess.run(
            command(kind, folder / f"{kind}_whole"), cwd=ROOT, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        whole[kind], seconds[kind] = digest(folder / f"{kind}_whole"), time.monotonic() - start
    while report["kills"] < config.kills:
        kind, number = draw.choice(list(RUNS)), report["runs"]
        run = folder / f"{kind}_{number}"
        report["runs"] += 1
        while sent := kill_run(kind, run, seconds[kind], draw):
            report["kills"] += 1
            report["left"] += sorted(wait_until_gone())
            say(f"kill {report['kills']:3}  {sent:8}{run.name}")
        steps = [line["step"] for line in read_log(run / "metrics.jsonl") if "loss" in line]
        if digest(run) != whole[kind] or steps != list(range(1, STEPS + 1)):
            report["differ"].append(run.name)
    return report


def resident(pid: int) -> float:
    """Return the resident memory of a process, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def family(pid: int) -> list[int]:
    """Return the ids of a process and of all its descendants."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += family(int(child))
    return found


def soak_memory(config: Config, folder: Path) -> dict:
    """Run RL with maths and code rewards, and compare memory and descriptors after step WARM."""
    settings = ["--max_steps", str(config.rl_steps), "--logging_steps", "1", "--learning_rate",
                "1e-6", "--output_dir", str(folder / "memory")]  # fmt: skip
    reward = folder / "both.py"
    reward.write_text(BOTH)
    flags = [*settings, *RL, "--reward", f"{reward}:both"]
    samples: list[dict] = []
    with subprocess.Popen(
        [sys.executable, "recipes/r1_zero.py", *flags], cwd=ROOT, stdout=subprocess.DEVNULL
    ) as run:
        while run.poll() is None:
            time.sleep(2)
            try:
                step = len(read_log(folder / "memory" / "metrics.jsonl"))
                ids = family(run.pid)
                samples.append({
                    "step": step, "trainer": resident(run.pid), "processes": len(ids),
                    "workers": sum(map(resident, ids[1:])),
                    "descriptors": sum(len(list(Path(f"/proc/{i}/fd").iterdir())) for i in ids),
                })  # fmt: skip
            except OSError:
                continue  # not started yet, or just ended
    warm = [sample for sample in samples if sample["step"] >= WARM]
    fifth = max(1, len(warm) // 5)
    first, last = warm[:fifth], warm[-fifth:]
    growth = {
        name: max(s[name] for s in last) / max(s[name] for s in first)
        for name in ("trainer", "workers", "processes", "descriptors")
    }
    is_flat = all(value <= FLAT for value in growth.values())
    return {"status": run.returncode, "growth": growth, "is_flat": is_flat, "last": samples[-1]}


# Arithmetic as rewards see it: the answer is verified as mathematics, and run as a program.
BOTH = '''"""The accuracy of an answer by maths, and of a program that prints it."""

from posttrain.rewards.code import code_reward
from posttrain.rewards.math import math_reward


def both(completions, answer, **_):
    programs = [f"```python\\nprint({gold!r})\\n```" for gold in answer]
    tests = [[{"stdin": "", "stdout": f"{gold}\\n"}] for gold in answer]
    ran = code_reward(programs[:1], tests=tests[:1])[0]
    found = math_reward(completions, answer=answer)
    return [score + 0.01 * ran * (len(text) % 3) for score, text in zip(found, completions)]
'''


def main(config: Config) -> dict:
    """Run both parts, write soak.json, and return its content."""
    folder = Path(config.output_dir).absolute()
    folder.mkdir(parents=True)
    os.environ[MARK] = str(os.getpid())
    report = {"memory": soak_memory(config, folder)} if config.rl_steps else {}
    say(json.dumps(report))
    if config.kills:
        report["kills"] = soak_kills(config, folder)
    (folder / "soak.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
