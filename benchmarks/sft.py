"""SFT on GSM8K: ours against TRL's SFTTrainer.

    python -m benchmarks.sft --data ../gsm8k/train.jsonl --threads 1

Both train the completion's tokens of the same documents, in the same order, 16 a step. Measured are
optimizer steps after one of warm-up: data loading, forward, backward, clipping, AdamW. Left out:
start-up, tokenising, saving. TRL's settings that are searched: padded and padding-free batches of
several sizes, sorted by length within the optimizer batch, with accumulation; and its packing.
Gradient checkpointing, which is on by default in TRL, is off on both sides.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.child import Job
from benchmarks.flops import Work, shared_prompt
from benchmarks.harness import Benchmark, Config, Setting, run
from benchmarks.peer import halves
from benchmarks.workload import made_documents, read_documents, read_or_made
from posttrain.run.options import parse, plain_errors

BATCH = 16
PACKED_LENGTHS = (1024, 2048)  # longer than any document: TRL would cut it
FIRST = {"loss": "loss", "grad_norm": "grad_norm"}  # name in the log -> name for both sides


def run_ours(job: Job) -> dict:
    """Measure SFTTrainer."""
    from benchmarks.measure import StepMeter, result

    meter = StepMeter(job.warmup_steps)
    our_trainer(job, [meter]).train()
    return result(meter, first=FIRST)


def our_trainer(job: Job, callbacks: Sequence[Any], **more: Any) -> Any:
    """Make an SFTTrainer; `more` changes its settings."""
    from datasets import Dataset

    from benchmarks.ours import settings
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.trainers.fit import training_arguments
    from posttrain.trainers.sft import SFTTrainer

    config = settings(job, **more)
    return SFTTrainer(
        load_model(config),
        training_arguments(config),
        documents=Dataset.from_list(job.examples()),
        tokenizer=load_tokenizer(job.model),
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        callbacks=callbacks,
    )


def run_peer(job: Job) -> dict:
    """Measure TRL's SFTTrainer."""
    from benchmarks.measure import StepMeter, result

    meter = StepMeter(job.warmup_steps)
    peer_trainer(job, [meter]).train()
    return result(meter, first=FIRST)


def peer_trainer(job: Job, callbacks: Sequence[Any], **more: Any) -> Any:
    """Make TRL's SFTTrainer; `more` changes its settings."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from benchmarks import peer

    micro_batch, packed = job.setting["micro_batch"], job.setting.get("packed_length")
    length = None if micro_batch == job.batch_size else _length
    steps = [
        [_labelled(document) for document in batch] for batch in peer.batches(job, length=length)
    ]
    cut = peer.cut(job, micro_batch)
    if packed:
        steps = _packed(steps, packed)
        cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(steps[0])}
    arguments = peer.arguments(
        SFTConfig,
        job,
        max_length=packed,
        packing=packed is not None,
        padding_free=job.setting.get("padding_free", False),
        dataset_kwargs={"skip_prepare_dataset": True},  # ids and labels are there already
        **cut,
        **more,
    )
    return SFTTrainer(
        peer.load_causal(job),
        arguments,
        train_dataset=Dataset.from_list(peer.flat(steps)),
        processing_class=peer.load_tokenizer(job),
        callbacks=callbacks,
    )


def _length(document: dict) -> int:
    return len(document["input_ids"])


def _labelled(document: dict) -> dict:
    """Make a row as TRL prepares it: -100 where a token is not trained."""
    ids, trained = document["input_ids"], document["trained"]
    return {
        "input_ids": ids,
        "labels": [i if t else -100 for i, t in zip(ids, trained, strict=True)],
    }


def _packed(steps: list[list[dict]], length: int) -> list[list[dict]]:
    """Pack every optimizer batch with TRL into equally many rows of at most `length` tokens."""
    from datasets import Dataset
    from trl import pack_dataset

    def rows(documents: list[dict], num_alone: int) -> list[dict]:
        alone = [{**row, "seq_lengths": [_length(row)]} for row in documents[:num_alone]]
        rest = Dataset.from_list(documents[num_alone:])
        return [*alone, *pack_dataset(rest, length)] if len(rest) else alone

    most = max(len(rows(batch, 0)) for batch in steps)
    packed = []
    for batch in steps:
        tries = (rows(batch, num_alone) for num_alone in range(len(batch) + 1))
        packed.append(next(found for found in tries if len(found) == most))
    return packed


make_examples = read_or_made(read_documents, made_documents)


def work(document: dict) -> Work:
    """Count the work on a document."""
    return shared_prompt(
        len(document["input_ids"]) - sum(document["trained"]), [sum(document["trained"])]
    )


def candidates(batch_size: int) -> list[Setting]:
    """List TRL's settings that are searched."""
    sizes = halves(batch_size)
    padded = [Setting(f"padded, {m} at once", {"micro_batch": m}) for m in sizes]
    free = [
        Setting(f"padding-free, {m} at once", {"micro_batch": m, "padding_free": True})
        for m in sizes[:-1]
    ]
    packed = [
        Setting(f"packed to {n}", {"micro_batch": 1, "packed_length": n}) for n in PACKED_LENGTHS
    ]
    return [*padded, *free, *packed]


def main(config: Config) -> dict:
    """Run the benchmark, and return its report."""
    batch_size = config.batch_size or BATCH
    return run(
        config,
        Benchmark(
            name="sft",
            what="SFT on completions, TRL's SFTTrainer as the peer",
            batch_size=BATCH,
            make_examples=make_examples,
            work=work,
            useful_flops=Work.training_flops,
            ours="benchmarks.sft:run_ours",
            peer="benchmarks.sft:run_peer",
            usual=Setting("one padded micro-batch", {"micro_batch": batch_size}),
            candidates=candidates(batch_size),
        ),
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
