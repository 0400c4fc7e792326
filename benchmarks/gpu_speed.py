"""The parts of benchmarks.gpu_check that measure: speeds and memory, with goals for some of them.

They run the functions of the other benchmarks, on made-up examples and random weights, in bfloat16
autocast over float32 weights. TRL's padded trainers run the same steps in two settings, and the
faster one counts; its static cache and padding-free batches are left to those benchmarks.
"""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import dpo, groups, scaling, sft
from benchmarks.child import Job, call
from benchmarks.flops import total
from benchmarks.gpu_lines import Line, Scale, rows, scale_of, with_examples
from benchmarks.harness import Setting
from benchmarks.report import OURS, DisagreementError, check_agreement
from benchmarks.workload import SIZES, Size, made_documents, made_pairs, model_folder

# Dense bfloat16 products in TFLOP a second, as the makers publish them.
PEAKS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}
MFU_GOAL, LEARNING_GOAL, DECODE_GOAL, GROWTH_GOAL = 50.0, 2.0, 3.0, 8.0


def model(job: Job) -> list[dict]:
    """Make the random weights that the other parts load."""
    _, size, _ = _start(job)
    millions = (size.linear_parameters + size.vocabulary * size.hidden) / 1e6
    return rows(Line("random weights", millions, "million"))


def _start(job: Job) -> tuple[Scale, Size, Job]:
    """The amounts of work, the model's size, and a job with the model and no setting."""
    scale = scale_of(job)
    size = SIZES[scale.size]
    folder = str(model_folder(size, None))
    return scale, size, replace(job, setting={}, model=folder, steps=scale.steps)


def _measured(job: Job, function: str, setting: dict[str, Any], name: str) -> dict:
    """Run a benchmark's function with the memory of earlier runs given back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    folder = f"{job.folder}/{name.replace(' ', '-')}"
    return call(replace(job, function=function, setting=setting, folder=folder))


def mfu(job: Job) -> list[dict]:
    """Measure SFT on documents of GSM8K's lengths: useful operations a second, and memory."""
    scale, size, job = _start(job)
    count = scale.documents
    examples = made_documents((1 + scale.steps) * count, vocabulary=size.vocabulary)
    job = with_examples(job, examples, count)
    found = _measured(job, "benchmarks.sft:run_ours", {}, "ours")
    work = total([sft.work(example) for example in examples[count:]])
    rate = work.training_flops(size) / found["wall_seconds"] / 1e12
    lines = [
        Line("SFT, tokens a second", work.tokens / found["wall_seconds"]),
        Line("SFT, useful operations a second", rate, "TFLOP"),
        Line("SFT, peak memory", found["peak_gb"], "GB"),
    ]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    share = 100 * rate / peak if peak else None
    note = f"of {peak:.0f} TFLOP a second" if peak else f"the peak of {name} is not known here"
    lines.append(Line("SFT, MFU", share, "%", MFU_GOAL, note=note))
    return rows(*lines)


def growth(job: Job) -> list[dict]:
    """Measure SFT steps on more and more packed tokens in one micro-batch, optimizer included.

    With gradient checkpointing, for 64k tokens of a billion parameters do not fit without.
    """
    scale, _, job = _start(job)
    lines, costs = [], []
    for tokens in scale.packed:
        setting = {"max_tokens_per_microbatch": tokens, "gradient_checkpointing": True}
        sized = replace(job, batch_size=tokens // scaling.DOCUMENT)
        found = _measured(sized, "benchmarks.scaling:packed_step", setting, f"packed {tokens}")
        costs.append(1e6 * found["wall_seconds"] / scale.steps / tokens)
        what = f"SFT step of {tokens:,} packed tokens"
        lines.append(Line(f"{what}, a token", costs[-1], "microseconds"))
        lines.append(Line(f"{what}, peak memory", found["peak_gb"], "GB"))
    rise = 100 * (max(costs) / costs[0] - 1)
    what = f"growth of a token's cost from {scale.packed[0]:,} tokens on"
    return rows(*lines, Line(what, rise, "%", GROWTH_GOAL, at_most=True))


def dpo_learning(job: Job) -> list[dict]:
    """Measure DPO, its reference pass included, and TRL's DPOTrainer on the same pairs."""
    scale, size, job = _start(job)
    pairs = made_pairs((1 + scale.steps) * scale.pairs, vocabulary=size.vocabulary)
    settings = [
        Setting("one micro-batch", {"micro_batch": scale.pairs, "precomputed": False}),
        Setting(
            f"reference precomputed, {scale.at_once} pairs at once",
            {"micro_batch": scale.at_once, "precomputed": True},
        ),
    ]
    tokens = sum(dpo.work(pair).tokens for pair in pairs[scale.pairs :])
    job = with_examples(job, pairs, scale.pairs)
    sides = ("benchmarks.dpo:run_ours", "benchmarks.dpo:run_peer")
    return _against("DPO", sides, job, settings, tokens, LEARNING_GOAL)


def grpo_learning(job: Job) -> list[dict]:
    """Measure GRPO on recorded completions, and TRL's GRPOTrainer on the same ones."""
    scale, job, made = _with_groups(job)
    at_once = (scale.prompts * groups.NUM_GENERATIONS, 2 * scale.at_once)
    settings = [Setting(f"{m} completions at once", {"micro_batch": m}) for m in at_once]
    tokens = sum(groups.work(group).tokens for group in made)
    sides = ("benchmarks.grpo:learn_ours", "benchmarks.grpo:learn_peer")
    return _against("GRPO", sides, job, settings, tokens, LEARNING_GOAL)


def decode(job: Job) -> list[dict]:
    """Measure HFGenerator, and transformers' generate on the same planned completions."""
    scale, job, made = _with_groups(job)
    settings = [Setting("all rows at once", {"rows": scale.prompts * groups.NUM_GENERATIONS})]
    tokens = sum(len(completion) for group in made for completion in group["completions"])
    sides = ("benchmarks.rollout:run_ours", "benchmarks.rollout:run_peer")
    return _against("decoding", sides, job, settings, tokens, DECODE_GOAL)


def _with_groups(job: Job) -> tuple[Scale, Job, list[dict]]:
    """The amounts of work, a job with examples that are groups, and those of measured steps."""
    scale, size, job = _start(job)
    count = (1 + scale.steps) * scale.prompts
    made = groups.make_groups(count, groups.GroupConfig(), size, Path(job.model))
    return scale, with_examples(job, made, scale.prompts), made[scale.prompts :]


def _against(
    name: str,
    sides: tuple[str, str],
    job: Job,
    settings: Sequence[Setting],
    tokens: int,
    goal: float,
) -> list[dict]:
    """Measure ours and the peer in its settings; compare seconds and memory with its fastest."""
    ours, theirs, tight = _measured(job, sides[0], {}, "ours"), {}, []
    for setting in settings:
        try:
            theirs[setting.name] = _measured(job, sides[1], setting.values, setting.name)
        except torch.OutOfMemoryError:
            tight.append(f"no memory for {setting.name}")
    lines = [
        Line(f"{name}, ours, tokens a second", tokens / ours["wall_seconds"]),
        Line(f"{name}, ours, peak memory", ours["peak_gb"], "GB"),
    ]
    what, note = f"{name}, the peer's seconds over ours", "; ".join(tight)
    if not theirs:
        return rows(*lines, Line(what, None, "x", goal, note=note))
    try:
        check_agreement({OURS: [ours], **{k: [run] for k, run in theirs.items()}}, dtype=job.dtype)
    except DisagreementError as error:
        return rows(*lines, Line(what, None, "x", goal, note=str(error)))
    best = min(theirs, key=lambda k: theirs[k]["wall_seconds"])
    found, note = theirs[best], "; ".join([best, *tight])
    return rows(
        *lines,
        Line(what, found["wall_seconds"] / ours["wall_seconds"], "x", goal, note=note),
        Line(f"{name}, the peer's memory over ours", found["peak_gb"] / ours["peak_gb"], "x"),
    )
