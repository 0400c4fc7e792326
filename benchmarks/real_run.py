"""A pretrained model on real data, SFT then DPO then GRPO, by posttrain and by TRL.

    python -m benchmarks.real_run --gsm8k ../gsm8k --pairs ../hh_rlhf/harmless-base-test.jsonl.gz

SmolLM2-135M-Instruct (fetched by `make real`) learns from GSM8K's solutions, from HH-RLHF's pairs
and by GRPO on problems of GSM8K that it has not seen, each stage from the model of the one before.
Both sides get the same batches in the same order, and the same settings; TRL has the setting of
micro-batches that a search of one step each finds best. Each part is a process of its own whose
result is kept in `--output`: the command goes on where it was stopped. Reported are the losses of
every step, CPU seconds (the process from its start to the last step), peak memory, and accuracy on
held-out problems and pairs before and after. `--write_docs` puts them into docs/real_run.md.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks import sft
from benchmarks.child import Job
from benchmarks.harness import Setting, machine, run_child
from benchmarks.real_report import write_docs, write_report
from benchmarks.workload import shuffled
from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors, say

MODEL = "runs/real_models/SmolLM2-135M-Instruct.Q4_1.gguf"
SIDES = ("ours", "peer")
LONGEST = 512  # tokens of a document, or of a prompt with its longer completion


@dataclass(kw_only=True)
class Config:
    """Settings of the run."""

    gsm8k: str = option(help="folder with GSM8K's train.jsonl and test.jsonl")
    pairs: str = option(help="HH-RLHF's pairs")
    model: str = option(MODEL, "a GGUF file, or a folder")
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "bfloat16 autocast, or float32")
    threads: int = option(1, "CPU threads of each process", at_least=1)
    sft_steps: int = option(24, "optimizer steps of 16 documents", at_least=1)
    dpo_steps: int = option(16, "optimizer steps of 8 pairs", at_least=1)
    grpo_steps: int = option(8, "steps of 4 prompts x 8 completions", at_least=1)
    problems: int = option(150, "held-out problems", at_least=1)
    held_out_pairs: int = option(150, "held-out pairs", at_least=1)
    output: str = option("runs/real_run", "folder of the results")
    write_docs: bool = option(False, "put table and plot into docs/real_run.md")

    def check(self) -> None:
        """Raise ConfigError where a file is missing."""
        for path in (f"{self.gsm8k}/train.jsonl", f"{self.gsm8k}/test.jsonl", self.pairs):
            if not Path(path).is_file():
                raise ConfigError(f"expected a file, found none at {path}.")
        if not Path(self.model).exists():
            raise ConfigError(f"--model: found none at {self.model}. `make real` fetches it.")


@dataclass(frozen=True)
class Stage:
    """A stage of training: both sides' trainers, and the settings that they share."""

    ours: str
    peer: str
    batch_size: int
    candidates: Sequence[Setting]
    options: dict[str, Any] = field(default_factory=dict)


STAGES = {
    "sft": Stage(
        "benchmarks.sft:our_trainer",
        "benchmarks.sft:peer_trainer",
        batch_size=16,
        candidates=[c for c in sft.candidates(16) if c.name != "padded, 8 at once"],
        options={"learning_rate": 5e-5},
    ),
    "dpo": Stage(
        "benchmarks.real_stages:our_dpo",
        "benchmarks.real_stages:peer_dpo",
        batch_size=8,
        candidates=[
            Setting(f"reference precomputed, {m} at once", {"micro_batch": m, "precomputed": True})
            for m in (8, 2, 1)
        ],
        options={"learning_rate": 5e-6},
    ),
    "grpo": Stage(
        "benchmarks.real_stages:our_grpo",
        "benchmarks.real_stages:peer_grpo",
        batch_size=4,
        candidates=[Setting(f"{m} completions at once", {"micro_batch": m}) for m in (8, 4)],
        options={"learning_rate": 1e-5},
    ),
}


def main(config: Config) -> None:
    """Run what is not there yet, and report."""
    folder = Path(config.output)
    start, data = prepare(config, folder)
    results: dict[str, Any] = {"base": _score(config, "base", start, problems=True)}
    models = dict.fromkeys(SIDES, start)
    for name, stage in STAGES.items():
        best = find_best(config, name, stage, models["peer"], data)
        for side, setting in zip(SIDES, (Setting("posttrain", {}), best), strict=True):
            trainer = getattr(stage, side)
            job = _job(config, f"{name}-{side}", models[side], data[name], trainer, stage, setting)
            results[f"{name}-{side}"] = {"setting": setting.name, **once(job, config)}
            models[side] = Path(job.folder) / "model"
            label, is_last = f"{name}-{side}-score", name in ("sft", "grpo")
            results[label] = _score(config, label, models[side], problems=is_last)
    results |= {"machine": machine(), "config": asdict(config)}
    (folder / "results.json").write_text(json.dumps(results))
    write_report(results, folder)
    if config.write_docs:
        write_docs(folder)


def prepare(config: Config, folder: Path) -> tuple[Path, dict[str, Path]]:
    """Write the model as safetensors and the examples of all stages, unless they are there."""
    start = folder / "start"
    data = {name: folder / f"{name}.json" for name in (*STAGES, "held_out")}
    if all(path.is_file() for path in (start / "config.json", *data.values())):
        return start, data
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.data import load_documents, load_pairs, load_prompts
    from posttrain.models.load import load_tokenizer, load_whole

    tokenizer = load_tokenizer(config.model)
    load_whole(AutoModelForCausalLM, config.model, dtype=torch.float32).save_pretrained(start)
    tokenizer.save_pretrained(start)
    chat = {"template": "chat", "say": say}
    train, test = (f"{config.gsm8k}/{part}.jsonl" for part in ("train", "test"))
    documents = list(load_documents(train, tokenizer, max_length=LONGEST, **chat))
    prompts = [_prompt(row) for row in load_prompts(train, tokenizer, **chat)]
    tests = [_prompt(row) for row in load_prompts(test, tokenizer, split=None, **chat)]
    pairs = list(load_pairs(config.pairs, tokenizer, max_length=LONGEST, split=None, **chat))
    random.Random(0).shuffle(pairs)
    used = config.sft_steps * STAGES["sft"].batch_size
    order = random.Random(0).sample(range(len(documents)), len(documents))
    unseen = order[used:][: config.grpo_steps * STAGES["grpo"].batch_size]
    held_out = pairs[: config.held_out_pairs]
    _write(data["sft"], [documents[i] for i in order[:used]])
    _write(data["dpo"], pairs[len(held_out) :][: config.dpo_steps * STAGES["dpo"].batch_size])
    _write(data["grpo"], [{**prompts[i], "completions": []} for i in unseen])
    problems = shuffled(tests, config.problems, seed=0)
    _write(data["held_out"], {"problems": problems, "pairs": held_out})
    return start, data


def _prompt(row: dict) -> dict:
    return {"prompt_ids": row["prompt_ids"], "columns": {"answer": row["answer"]}}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def find_best(
    config: Config, name: str, stage: Stage, model: Path, data: dict[str, Path]
) -> Setting:
    """Return the peer's setting with the least CPU seconds in one optimizer step."""
    seconds = {}
    for place, candidate in enumerate(stage.candidates):
        label = f"{name}-search-{place}"
        job = _job(config, label, model, data[name], stage.peer, stage, candidate, steps=1)
        seconds[place] = once(job, config)["cpu_seconds"]
        say(f"search  {name}: TRL, {candidate.name}: {seconds[place]:.1f} CPU s")
    return stage.candidates[min(seconds, key=seconds.get)]


def _job(
    config: Config,
    label: str,
    model: Path,
    data: Path,
    trainer: str,
    stage: Stage,
    setting: Setting,
    *,
    steps: int | None = None,
) -> Job:
    """A stage by one side, kept; or with `steps` a try of so many."""
    asked = {"trainer": trainer, "setting": setting.values, "options": stage.options}
    return Job(
        function="benchmarks.real_stages:train",
        setting={**asked, "saves": steps is None},
        model=str(model),
        data=str(data),
        folder=str(Path(config.output) / label),
        dtype=config.dtype,
        batch_size=stage.batch_size,
        steps=steps or getattr(config, f"{label.partition('-')[0]}_steps"),
        warmup_steps=0,
    )


def _score(config: Config, label: str, model: Path, *, problems: bool) -> dict:
    job = Job(
        function="benchmarks.real_stages:score",
        setting={"problems": problems},
        model=str(model),
        data=str(Path(config.output) / "held_out.json"),
        folder=str(Path(config.output) / label),
        dtype=config.dtype,
        batch_size=1,
        steps=1,
    )
    return once(job, config)


def once(job: Job, config: Config) -> dict:
    """Return the result of a job, which is run unless the same one has been."""
    folder = Path(job.folder)
    known, result = folder / "job.json", folder / "result.json"
    if result.is_file() and json.loads(known.read_text()) == asdict(job):
        return json.loads(result.read_text())
    say(f"running {folder.name}")
    result.unlink(missing_ok=True)
    return run_child(job, config)


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
