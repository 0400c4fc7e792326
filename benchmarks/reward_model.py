"""A reward model on HH-RLHF: ours against TRL's RewardTrainer.

    python -m benchmarks.reward_model --data ../hh_rlhf/harmless-base-test.jsonl.gz --threads 1

Both train the same classifier, score head included, with Bradley and Terry's loss on the same pairs
in the same order, 8 a step. Measured are optimizer steps after one of warm-up. Left out: start-up,
tokenising, saving. TRL's settings that are searched: batches of several sizes, sorted by length
within the optimizer batch, with accumulation. Gradient checkpointing is off on both sides.
"""

from pathlib import Path

from benchmarks.child import Job
from benchmarks.dpo import longest, make_examples
from benchmarks.dpo import work as pair_work
from benchmarks.flops import Work
from benchmarks.harness import Benchmark, Config, Setting, run
from benchmarks.peer import halves
from benchmarks.workload import Size, model_folder
from posttrain.run.options import parse, plain_errors

BATCH = 8
FIRST = {"loss": "loss", "grad_norm": "grad_norm"}


def run_ours(job: Job) -> dict:
    """Measure RewardTrainer."""
    from datasets import Dataset

    from benchmarks.measure import StepMeter, result
    from benchmarks.ours import settings
    from posttrain.models.load import load_tokenizer
    from posttrain.models.reward_model import load_reward_model
    from posttrain.trainers.fit import training_arguments
    from posttrain.trainers.reward import RewardTrainer

    config, meter = settings(job), StepMeter(job.warmup_steps)
    tokenizer = load_tokenizer(job.model)
    trainer = RewardTrainer(
        load_reward_model(config, tokenizer),
        training_arguments(config),
        pairs=Dataset.from_list(job.examples()),
        tokenizer=tokenizer,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        callbacks=[meter],
    )
    trainer.train()
    return result(meter, first=FIRST)


def run_peer(job: Job) -> dict:
    """Measure TRL's RewardTrainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    from benchmarks import peer
    from benchmarks.measure import StepMeter, result

    micro_batch = job.setting["micro_batch"]
    length = None if micro_batch == job.batch_size else longest
    pairs = [
        {name: pair["prompt_ids"] + pair[name] for name in ("chosen_ids", "rejected_ids")}
        for pair in peer.flat(peer.batches(job, length=length))
    ]
    meter = StepMeter(job.warmup_steps)
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(job.model, dtype=torch.float32),
        peer.arguments(RewardConfig, job, max_length=None, **peer.cut(job, micro_batch)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=peer.load_tokenizer(job),
        callbacks=[meter],
    )
    trainer.train()
    return result(meter, first=FIRST)


def classifier_folder(size: Size, data: str | None, *, seed: int) -> Path:
    """The causal model of model_folder with a random score head instead of its LM head."""
    causal = model_folder(size, data, seed=seed)
    folder = causal.with_name(f"{causal.name}-classifier")
    if not (folder / "config.json").is_file():
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=1)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(causal).save_pretrained(folder)
    return folder


def work(pair: dict) -> Work:
    """Count the work on a pair, without an LM head."""
    return pair_work(pair)._replace(scored=0)  # no LM head


def main(config: Config) -> dict:
    """Run the benchmark, and return its report."""
    batch_size = config.batch_size or BATCH
    return run(
        config,
        Benchmark(
            name="reward_model",
            what="a reward model, TRL's RewardTrainer as the peer",
            batch_size=BATCH,
            make_model=classifier_folder,
            make_examples=make_examples,
            work=work,
            useful_flops=Work.training_flops,
            ours="benchmarks.reward_model:run_ours",
            peer="benchmarks.reward_model:run_peer",
            usual=Setting("one micro-batch", {"micro_batch": batch_size}),
            candidates=[
                Setting(f"{m} pairs at once", {"micro_batch": m}) for m in halves(batch_size)
            ],
        ),
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
