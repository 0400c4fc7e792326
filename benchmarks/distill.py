"""GKD on given completions: ours against TRL's GKDTrainer (trl.experimental.gkd).

    python -m benchmarks.distill --data ../gsm8k/train.jsonl --threads 1

Both learn a teacher's distributions, by the generalised JSD with beta 0.5, at the completions'
tokens of the same documents, in the same order, 16 a step. The teacher is of the student's size,
with other random weights. No completion is generated (lambda 0), since two samplers would give two
texts. Measured are optimizer steps after one of warm-up: both forwards, the loss, backward,
clipping, AdamW. Left out: start-up, tokenising, saving. TRL's settings that are searched: batches
of several sizes, sorted by length within the optimizer batch, with accumulation; its GKD has no
padding-free way. Gradient checkpointing, which is on by default in TRL, is off on both sides.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.child import Job
from benchmarks.flops import Work
from benchmarks.harness import Benchmark, Config, Setting, run
from benchmarks.peer import halves
from benchmarks.sft import FIRST, make_examples, work
from benchmarks.workload import SIZES, Size, model_folder
from posttrain.run.options import parse, plain_errors

BATCH = 16
BETA = 0.5
TEACHER_SEED = 1000  # added to the student's


def run_ours(job: Job) -> dict:
    """Measure DistillTrainer."""
    from benchmarks.measure import StepMeter, result

    meter = StepMeter(job.warmup_steps)
    our_trainer(job, [meter]).train()
    return result(meter, first=FIRST)


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
    name = own.pop("teacher")
    config = settings(replace(job, setting=own), **more)
    teacher = ModelConfig(model_name_or_path=name, dtype=job.dtype)
    return DistillTrainer(
        load_model(config),
        training_arguments(config),
        documents=Dataset.from_list(job.examples()),
        tokenizer=load_tokenizer(job.model),
        teacher=ModelTeacher(load_for_inference(teacher)),
        plan=Distillation(partial(generalised_jsd_with_slope, beta=BETA)),
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        callbacks=callbacks,
    )


def run_peer(job: Job) -> dict:
    """Measure TRL's GKDTrainer."""
    from benchmarks.measure import StepMeter, result

    meter = StepMeter(job.warmup_steps)
    peer_trainer(job, [meter]).train()
    return result(meter, first=FIRST)


def peer_trainer(job: Job, callbacks: Sequence[Any], **more: Any) -> Any:
    """Make TRL's GKDTrainer; `more` changes its settings."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from benchmarks import peer

    micro_batch = job.setting["micro_batch"]
    length = None if micro_batch == job.batch_size else _length
    arguments = peer.arguments(
        GKDConfig,
        job,
        beta=BETA,
        lmbda=0.0,
        max_length=None,
        **peer.cut(job, micro_batch),
        **more,
    )
    return GKDTrainer(
        peer.load_causal(job),
        teacher_model=peer.load_causal(replace(job, model=job.setting["teacher"])),
        args=arguments,
        data_collator=_padded,
        train_dataset=Dataset.from_list(peer.flat(peer.batches(job, length=length))),
        processing_class=peer.load_tokenizer(job),
        callbacks=callbacks,
    )


def _length(document: dict) -> int:
    return len(document["input_ids"])


def _padded(documents: list[dict]) -> dict:
    """Make a batch as TRL's collator of conversations pads one: on the left."""
    import torch

    width = max(map(_length, documents))
    ids, mask, labels = torch.zeros(3, len(documents), width, dtype=torch.long).unbind(0)
    labels = torch.full_like(labels, -100)
    for row, document in enumerate(documents):
        these = torch.tensor(document["input_ids"])
        trained = torch.tensor(document["trained"], dtype=torch.bool)
        ids[row, -len(these) :] = these
        mask[row, -len(these) :] = 1
        labels[row, -len(these) :] = these.masked_fill(~trained, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def useful_flops(work: Work, size: Size) -> int:
    """Count the operations of training and of the teacher's forward pass."""
    return work.training_flops(size) + work.forward_flops(size)


def main(config: Config) -> dict:
    """Run the benchmark, and return its report."""
    batch_size = config.batch_size or BATCH
    seed = config.seed + TEACHER_SEED
    teacher = {"teacher": str(model_folder(SIZES[config.size], config.data, seed=seed))}
    return run(
        config,
        Benchmark(
            name="distill",
            what="GKD on given completions, TRL's GKDTrainer as the peer",
            batch_size=BATCH,
            make_examples=make_examples,
            work=work,
            useful_flops=useful_flops,
            ours="benchmarks.distill:run_ours",
            peer="benchmarks.distill:run_peer",
            usual=Setting("one micro-batch", {"micro_batch": batch_size, **teacher}),
            candidates=[
                Setting(f"{m} at once", {"micro_batch": m, **teacher}) for m in halves(batch_size)
            ],
            our_values=teacher,
        ),
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
