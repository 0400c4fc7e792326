"""GKD: ours against TRL's GKDTrainer (trl.experimental.gkd).

    python -m benchmarks.distill --data ../gsm8k/train.jsonl               given completions
    python -m benchmarks.distill --data ../gsm8k/train.jsonl --on_policy   the student's own

Both learn a teacher's distributions, by the generalised JSD with beta 0.5, at the completions'
tokens of the same documents, in the same order, 16 a step. The teacher is of the student's size,
with other random weights. Given completions are those of the data (lambda 0). With `--on_policy`
(lambda 1) each side's student writes some of the same planned lengths, at most 128 tokens
(groups.py): numbers of tokens are compared in place of losses. Measured are optimizer steps after
one of warm-up: generation, both forwards, the loss, backward, clipping, AdamW. Left out: start-up,
tokenising, saving. TRL's settings that are searched: batches of several sizes, sorted by length
within the optimizer batch, with accumulation; its GKD has no padding-free way, and completes one
micro-batch at a time. Gradient checkpointing, which is on by default in TRL, is off on both sides.
"""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.child import Job
from benchmarks.flops import Work
from benchmarks.groups import MAX_COMPLETION, our_sampling, plan_peer_completions, plan_seeded
from benchmarks.harness import Benchmark, Config, Setting, run
from benchmarks.peer import halves
from benchmarks.sft import FIRST, work
from benchmarks.sft import make_examples as make_documents
from benchmarks.workload import SIZES, Size, model_folder
from posttrain.run.options import option, parse, plain_errors

BATCH = 16
BETA = 0.5
TEACHER_SEED = 1000  # added to the student's
OUR_SEED = 0  # of training, which decides on the seeds of completions
TOKENS = "mean_completion_tokens"


@dataclass(kw_only=True)
class DistillConfig(Config):
    """Settings of the distillation benchmark."""

    on_policy: bool = option(False, "the student writes the completions")


def run_ours(job: Job) -> dict:
    """Measure DistillTrainer."""
    from benchmarks.measure import StepMeter, result

    meter, on_policy = StepMeter(job.warmup_steps), job.setting["on_policy"]
    with plan_our_completions(job) if on_policy else nullcontext():
        our_trainer(job, [meter]).train()
    return result(meter, first={TOKENS: TOKENS} if on_policy else FIRST)


def plan_our_completions(job: Job) -> Any:
    """Return a context in which each document's completion has its planned number of tokens."""
    lengths = {
        random.Random(f"tokens {OUR_SEED} {row // job.batch_size} {row}").getrandbits(63): length
        for row, length in enumerate(sum(document["trained"]) for document in job.examples())
    }
    return plan_seeded(lambda seeds: [lengths[seed] for seed in seeds])


def our_trainer(job: Job, callbacks: Sequence[Any], **more: Any) -> Any:
    """Make a DistillTrainer; `more` changes its settings."""
    from functools import partial

    from datasets import Dataset

    from benchmarks.ours import settings
    from posttrain.losses import generalised_jsd_with_slope
    from posttrain.models.load import load_for_inference, load_model, load_tokenizer
    from posttrain.run.settings import ModelConfig
    from posttrain.trainers.distill import Distillation, DistillTrainer
    from posttrain.trainers.fit import training_arguments
    from posttrain.trainers.teachers import ModelTeacher

    own = dict(job.setting)
    name, on_policy = own.pop("teacher"), own.pop("on_policy")
    config = settings(replace(job, setting=own), **more)
    teacher = ModelConfig(model_name_or_path=name, dtype=job.dtype)
    return DistillTrainer(
        load_model(config),
        training_arguments(config),
        documents=Dataset.from_list(job.examples()),
        tokenizer=load_tokenizer(job.model),
        teacher=ModelTeacher(load_for_inference(teacher)),
        plan=Distillation(
            partial(generalised_jsd_with_slope, beta=BETA),
            on_policy=float(on_policy),
            sampling=our_sampling() if on_policy else None,
        ),
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        callbacks=callbacks,
    )


def run_peer(job: Job) -> dict:
    """Measure TRL's GKDTrainer."""
    from benchmarks.measure import StepMeter, result

    meter, counts = StepMeter(job.warmup_steps), []
    trainer = peer_trainer(job, [meter])
    if not job.setting["on_policy"]:
        trainer.train()
        return result(meter, first=FIRST)
    size = job.setting["micro_batch"]
    lengths = [sum(document["trained"]) for document in peer_documents(job)]
    plan_peer_completions(
        trainer.model, [lengths[i : i + size] for i in range(0, len(lengths), size)]
    )
    plain = trainer.generate_on_policy_outputs

    def counted(*arguments: Any) -> Any:
        ids, mask, labels = plain(*arguments)
        counts.append(int((labels != -100).sum()))
        return ids, mask, labels

    trainer.generate_on_policy_outputs = counted
    trainer.train()
    found = sum(counts[: job.batch_size // size]) / job.batch_size
    return {**result(meter, first={}), "first": {TOKENS: found}}


def peer_trainer(job: Job, callbacks: Sequence[Any], **more: Any) -> Any:
    """Make TRL's GKDTrainer; `more` changes its settings."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from benchmarks import peer

    micro_batch, on_policy = job.setting["micro_batch"], job.setting["on_policy"]
    arguments = peer.arguments(
        GKDConfig,
        job,
        beta=BETA,
        lmbda=float(on_policy),
        temperature=1.0,
        max_new_tokens=MAX_COMPLETION,
        max_length=None,
        **peer.cut(job, micro_batch),
        **more,
    )
    return GKDTrainer(
        peer.load_causal(job),
        teacher_model=peer.load_causal(replace(job, model=job.setting["teacher"])),
        args=arguments,
        data_collator=_padded,
        train_dataset=Dataset.from_list(peer_documents(job)),
        processing_class=peer.load_tokenizer(job),
        callbacks=callbacks,
    )


def peer_documents(job: Job) -> list[dict]:
    """Return the documents in TRL's order: sorted within a step that is cut."""
    from benchmarks import peer

    length = None if job.setting["micro_batch"] == job.batch_size else _length
    return peer.flat(peer.batches(job, length=length))


def _length(document: dict) -> int:
    return len(document["input_ids"])


def _padded(documents: list[dict]) -> dict:
    """Make a batch as TRL's collator of conversations pads one: on the left."""
    ids = [document["input_ids"] for document in documents]
    labels = [
        [i if trained else -100 for i, trained in zip(row, document["trained"], strict=True)]
        for row, document in zip(ids, documents, strict=True)
    ]
    prompts = [document["input_ids"][: document["trained"].index(True)] for document in documents]
    return {
        "input_ids": _left(ids, 0),
        "attention_mask": _left([[1] * len(row) for row in ids], 0),
        "labels": _left(labels, -100),
        "prompts": _left(prompts, 0),
        "prompt_attention_mask": _left([[1] * len(row) for row in prompts], 0),
    }


def _left(rows: list[list[int]], fill: int) -> Any:
    import torch

    width = max(map(len, rows))
    return torch.tensor([[fill] * (width - len(row)) + row for row in rows])


def useful_flops(work: Work, size: Size) -> int:
    """Count the operations of training and of the teacher's forward pass."""
    return work.training_flops(size) + work.forward_flops(size)


def on_policy_flops(work: Work, size: Size) -> int:
    """Count the operations of training, of the teacher's forward pass and of generation."""
    return useful_flops(work, size) + work.forward_flops(size)


def make_examples(count: int, config: DistillConfig, size: Size, folder: Path) -> list[dict]:
    """Make documents; with completions by the student no longer than those may be."""
    documents = make_documents(count, config, size, folder)
    if not config.on_policy:
        return documents
    cut = [max(0, sum(document["trained"]) - MAX_COMPLETION) for document in documents]
    return [
        {name: document[name][: len(document[name]) - n] for name in ("input_ids", "trained")}
        for document, n in zip(documents, cut, strict=True)
    ]


def main(config: DistillConfig) -> dict:
    """Run the benchmark, and return its report."""
    batch_size = config.batch_size or BATCH
    seed = config.seed + TEACHER_SEED
    teacher = str(model_folder(SIZES[config.size], config.data, seed=seed))
    own = {"teacher": teacher, "on_policy": config.on_policy}
    whose = "the student's own" if config.on_policy else "given"
    return run(
        config,
        Benchmark(
            name="distill_on_policy" if config.on_policy else "distill",
            what=f"GKD on {whose} completions, TRL's GKDTrainer as the peer",
            batch_size=BATCH,
            make_examples=make_examples,
            work=work,
            useful_flops=on_policy_flops if config.on_policy else useful_flops,
            ours="benchmarks.distill:run_ours",
            peer="benchmarks.distill:run_peer",
            usual=Setting("one micro-batch", {"micro_batch": batch_size, **own}),
            candidates=[
                Setting(f"{m} at once", {"micro_batch": m, **own}) for m in halves(batch_size)
            ],
            our_values=own,
        ),
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(DistillConfig))
