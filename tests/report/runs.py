"""Run folders made by hand: numbers and texts that a test knows, without any training."""

import json
import math
from pathlib import Path

import yaml

PARTS = ("accuracy", "format")
CONFIG = {
    "output_dir": "runs/x", "seed": 3, "max_steps": 100, "learning_rate": 1e-4,
    "max_grad_norm": 1.0, "model_name_or_path": "runs/base/model", "dataset": "data/problems.jsonl",
    "beta": None, "use_peft": False,
}  # fmt: skip
ENVIRONMENT = {
    "run": "0" * 32, "time": "2026-01-01T00:00:00+00:00", "command": "python recipes/r1_zero.py",
    "git": "f" * 40, "python": "3.11.7", "platform": "Linux", "packages": {"torch": "2.13.0"},
    "cpu": "a processor", "cpu_cores": 2, "gpus": [], "world_size": 1,
    "inputs": {"dataset": {"path": "data/problems.jsonl", "sha256": "a" * 64}},
    "trainer": "RLTrainer", "rows": {"train": 1000, "held_out": 512},
    "rewards": {"accuracy": 1.0, "format": 0.2}, "defaults": {"learning_rate": 1e-3},
}  # fmt: skip


def rl_line(step: int, steps: int) -> dict:
    """A log line of a run that learns, with every metric of an RL run."""
    done = step / steps
    accuracy = 0.2 + 0.6 * done + 0.05 * math.sin(step)
    form = 0.6 + 0.4 * done
    return {
        "step": step, "epoch": done, "seconds": 2.0 * step, "loss": -0.03 + 0.01 * math.cos(step),
        "grad_norm": 0.3, "learning_rate": 1e-4 * (1 - done), "accuracy": accuracy,
        "format": form, "reward": accuracy + 0.2 * form, "clip_share": 0.01, "entropy": 0.5,
        "kl": 0.01 + 0.001 * math.sin(step), "mean_completion_tokens": 30 + math.sin(step),
        "completion_tokens_p10": 20, "completion_tokens_p50": 30, "completion_tokens_p90": 40,
        "repetition": 0.02, "ratio_outside": 0.0, "reward_failures": 0.0, "reward_std_zero": 0.1,
        "sampler_gap": 3.1234567e-7, "seconds_generate": 1.2345678, "seconds_reward": 0.3,
        "seconds_train": 0.8, "tokens_per_second": 1234.5678, "truncated": 0.01, "unscored": 0.0,
        "peak_memory_gb": 1.5, "warnings": 0,
    }  # fmt: skip


def sample(step: int, number: int, *, prompt: str = "1 + 1?", text: str = "", **changes) -> dict:
    """A record of samples.jsonl; its tokens are its words, with log-probs that get lower."""
    words = (text or f"<think>step {step}</think><answer>{number}</answer>").split(" ")
    tokens = [[w if i == 0 else f" {w}", round(-0.3 * i, 3), 1] for i, w in enumerate(words)]
    right = float(number % 2)
    record = {
        "step": step, "prompt": prompt, "completion": "".join(t[0] for t in tokens),
        "reward": right + 0.2, "accuracy": right, "format": 1.0, "tokens": len(tokens) + 1,
        "finish_reason": "stop", "parts": list(PARTS), "chosen": "first",
        "rules": {"accuracy": "equal numbers" if right else "different numbers"},
        "token_logps": [*tokens, ["<|end|>", -0.01, 1]],
    }  # fmt: skip
    return {**record, **changes}


def write_run(
    folder: Path, lines, *, samples=(), is_finished=True, config=(), **environment
) -> Path:
    """Write a run folder of these lines and samples."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **dict(config)}, sort_keys=False))
    (folder / "env.json").write_text(json.dumps({**ENVIRONMENT, **environment}))
    write_lines(folder / "metrics.jsonl", lines)
    if samples:
        write_lines(folder / "samples.jsonl", samples)
    if is_finished:
        (folder / "model").mkdir()
    return folder


def write_lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def rl_run(folder: Path, *, steps: int = 40, samples=None, **settings) -> Path:
    """A run that learns, evaluated at its start, in its middle and at its end."""
    lines = [rl_line(step, steps) for step in range(1, steps + 1)]
    for step, accuracy in ((0, 0.2), (steps // 2, 0.5), (steps, 0.8)):
        lines.append({"step": step, "seconds": 2.0 * step, "eval_accuracy": accuracy,
                      "eval_format": 1.0, "eval_reward": accuracy + 0.2})  # fmt: skip
    if samples is None:
        samples = [sample(step, n) for step in range(1, steps + 1, 10) for n in range(3)]
        samples += [
            sample(step, step, prompt="2 + 2?", chosen="held out")
            for step in (0, steps // 2, steps)
        ]
    return write_run(folder, lines, samples=samples, **settings)


def sft_run(folder: Path, *, losses=(2.0, 1.5, 1.2, 1.0), **settings) -> Path:
    """A run that rewards nothing."""
    lines = [
        {"step": 10 * i, "seconds": 5.0 * i, "loss": loss, "grad_norm": 0.5, "learning_rate": 1e-4}
        for i, loss in enumerate(losses, start=1)
    ]
    return write_run(folder, lines, trainer="SFTTrainer", rewards={}, **settings)
