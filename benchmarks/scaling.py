"""Measure how our cost grows: time and memory against tokens, pairs and vocabulary.

    python -m benchmarks.scaling [--threads 2]

Each point is a process of its own, on the tiny model. Writes a JSON file, and a plot of each curve
to `benchmarks/plots`:

- a step of SFT on 8k to 64k tokens, documents of 256 tokens each, in the recipes' micro-batches:
  CPU time a token, and peak memory above that before the first step;
- a DPO step, reference included, on pairs of growing prompts and completions: CPU time;
- the LM head on 2,048 tokens, vocabularies of 8k to 128k: peak memory beyond weight and gradients.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.child import Job
from benchmarks.harness import machine, run_child
from benchmarks.plot import line_plot
from benchmarks.workload import EOS_ID, ROOT, SIZES, model_folder
from posttrain.run.options import option, parse, plain_errors

PACKED_TOKENS = (8_192, 16_384, 32_768, 65_536)
DOCUMENT = 256
PAIR_TOKENS = (64, 128, 256, 512)  # of the prompt; the two completions have half as many each
PAIRS = 16
VOCABULARIES = (8_192, 16_384, 32_768, 65_536, 131_072)
HEAD_TOKENS, HEAD_WIDTH = 2_048, 256
PLOTS = Path("benchmarks/plots")


@dataclass(kw_only=True)
class Config:
    """Settings of the scaling benchmark."""

    threads: int = option(1, "CPU threads", at_least=1)
    rounds: int = option(3, "runs of each point", at_least=1)
    max_tokens_per_microbatch: int | None = option(
        None, "packed tokens of SFT at once; none: recipes' default", at_least=1
    )
    steps: int = option(2, "measured steps of a run, after one of warm-up", at_least=1)
    output: str = option(str(ROOT), "folder of the results")


def packed_step(job: Job) -> dict:
    """Run SFT steps."""
    from datasets import Dataset

    from benchmarks.measure import StepMeter, peak_gigabytes, result
    from benchmarks.ours import settings
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.trainers.fit import training_arguments
    from posttrain.trainers.sft import SFTTrainer

    config, meter = settings(job), StepMeter(job.warmup_steps)
    ids = [2 + i % 4_000 for i in range(DOCUMENT - 1)] + [EOS_ID]
    document = {"input_ids": ids, "trained": [False] * 64 + [True] * (DOCUMENT - 64)}
    trainer = SFTTrainer(
        load_model(config, quiet=True),
        training_arguments(config),
        documents=Dataset.from_list([document] * (job.batch_size * 2)),
        tokenizer=load_tokenizer(job.model),
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        callbacks=[meter],
    )
    before = peak_gigabytes()
    trainer.train()
    found = result(meter, first={})
    return {**found, "gigabytes": found["peak_gb"] - before}


def head_memory(job: Job) -> dict:
    """Measure the peak memory of log-probs and backward, less inputs and gradients themselves."""
    import torch

    from benchmarks.measure import peak_gigabytes
    from posttrain.packed.head import chunked_logps

    vocabulary = job.setting["vocabulary"]
    hidden = torch.randn(HEAD_TOKENS, HEAD_WIDTH, requires_grad=True)
    weight = torch.randn(vocabulary, HEAD_WIDTH).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (HEAD_TOKENS,))
    warm = torch.randn(2, HEAD_WIDTH, requires_grad=True)
    chunked_logps(warm, torch.zeros(8, HEAD_WIDTH), targets[:2] % 8).logps.sum().backward()
    before = peak_gigabytes()
    chunked_logps(hidden, weight, targets).logps.sum().backward()
    gradients = (hidden.grad.nbytes + weight.grad.nbytes) / 1e9
    return {"gigabytes": peak_gigabytes() - before - gradients}


def dpo_examples(tokens: int, count: int) -> list[dict]:
    """Make equal pairs of a prompt of `tokens` tokens and completions half as long."""
    prompt, completion = [5] * tokens, [*[7] * (tokens // 2 - 1), EOS_ID]
    return [{"prompt_ids": prompt, "chosen_ids": completion, "rejected_ids": completion}] * count


def main(config: Config) -> dict:
    """Measure all points, write and plot them, and return the report."""
    folder = Path(config.output) / "scaling" / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    model = str(model_folder(SIZES["tiny"], None))
    job = Job("", {}, model, "", str(folder), "float32", batch_size=1, steps=config.steps)
    report = {
        "config": asdict(config),
        "machine": machine(),
        "packed": [packed_point(job, tokens, config) for tokens in PACKED_TOKENS],
        "dpo": [dpo_point(job, tokens, config) for tokens in PAIR_TOKENS],
        "head": [head_point(job, vocabulary, config) for vocabulary in VOCABULARIES],
    }
    folder.with_suffix(".json").write_text(json.dumps(report, indent=1))
    plot(report)
    print_report(report)
    return report


def packed_point(job: Job, tokens: int, config: Config) -> dict:
    """Measure SFT steps on this number of tokens."""
    job = replace(
        job,
        function="benchmarks.scaling:packed_step",
        setting={"max_tokens_per_microbatch": config.max_tokens_per_microbatch},
        batch_size=tokens // DOCUMENT,
    )
    found = medians(job, f"packed-{tokens}", config)
    seconds = found["cpu_seconds"] / config.steps
    return {"tokens": tokens, "seconds": seconds, "gigabytes": found["gigabytes"]}


def dpo_point(job: Job, tokens: int, config: Config) -> dict:
    """Measure DPO steps on pairs with prompts of this length."""
    data = Path(job.folder) / f"pairs-{tokens}.json"
    data.write_text(json.dumps(dpo_examples(tokens, PAIRS * (1 + config.steps))))
    job = replace(job, function="benchmarks.dpo:run_ours", data=str(data), batch_size=PAIRS)
    seconds = medians(job, f"dpo-{tokens}", config)["cpu_seconds"] / config.steps
    return {"tokens": 2 * tokens * PAIRS, "seconds": seconds}


def head_point(job: Job, vocabulary: int, config: Config) -> dict:
    """Measure the head with this vocabulary."""
    setting = {"vocabulary": vocabulary}
    job = replace(job, function="benchmarks.scaling:head_memory", setting=setting)
    return {"vocabulary": vocabulary, **medians(job, f"head-{vocabulary}", config)}


def medians(job: Job, name: str, config: Config) -> dict[str, float]:
    """Return the median over all rounds of each number that the job gives."""
    places = [str(Path(job.folder) / f"{name}-{number}") for number in range(config.rounds)]
    results = [run_child(replace(job, folder=place), config) for place in places]
    numbers = [key for key, value in results[0].items() if isinstance(value, float)]
    return {key: median(result[key] for result in results) for key in numbers}


def plot(report: dict) -> None:
    """Plot the curves as SVG files."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    packed, dpo, head = report["packed"], report["dpo"], report["head"]
    k = 1024
    plots = {
        "time_per_token": (
            [(p["tokens"] / k, 1e6 * p["seconds"] / p["tokens"]) for p in packed],
            "packed tokens, thousands",
            "CPU microseconds a token, SFT step",
        ),
        "memory": (
            [(p["tokens"] / k, p["gigabytes"]) for p in packed],
            "packed tokens, thousands",
            "GB above the memory before training",
        ),
        "dpo_step": (
            [(p["tokens"] / k, p["seconds"]) for p in dpo],
            "prompt + chosen + rejected tokens, thousands",
            "CPU seconds a DPO step",
        ),
        "head_memory": (
            [(p["vocabulary"] / k, p["gigabytes"]) for p in head],
            "vocabulary, thousands",
            "GB of the head beyond weight and gradients",
        ),
    }
    for name, (points, across, up) in plots.items():
        (PLOTS / f"{name}.svg").write_text(line_plot(points, across=across, up=up))


def print_report(report: dict) -> None:
    """Print all points."""
    rates = [1e6 * point["seconds"] / point["tokens"] for point in report["packed"]]
    print(f"time per packed token: {min(rates):.1f} to {max(rates):.1f} CPU microseconds")
    for name in ("packed", "dpo", "head"):
        for found in report[name]:
            print(name, "  ".join(f"{key} {value:.4g}" for key, value in found.items()))
    print(f"plots in {PLOTS}")


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
