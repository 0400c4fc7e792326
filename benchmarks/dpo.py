"""DPO on HH-RLHF: ours against TRL's DPOTrainer, the reference pass included on both sides.

    python -m benchmarks.dpo --data ../hh_rlhf/harmless-base-test.jsonl.gz --threads 1

Both train on the same pairs in the same order, 8 a step. Measured are optimizer steps after one of
warm-up, and the reference log-probs of their pairs, which ours and TRL's `precompute` compute
before the first step: of that pass, over all pairs of the run, the share of the measured pairs'
tokens counts. Left out: start-up, tokenising, saving. TRL's settings that are searched: precomputed
reference, batches of several sizes, sorted by length within the optimizer batch, with
accumulation. Gradient checkpointing, which is on by default in TRL, is off on both sides.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.child import Job
from benchmarks.flops import Work, shared_prompt
from benchmarks.harness import Benchmark, Config, Setting, run
from benchmarks.peer import halves
from benchmarks.workload import Size, made_pairs, read_or_made, read_pairs
from posttrain.run.options import parse, plain_errors

BATCH = 8
BETA = 0.1
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Name in the log -> name for both sides. The first loss is log 2 whatever the model computes.
FIRST_OURS = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "chosen_logps": "chosen_logps",
    "rejected_logps": "rejected_logps",
}
FIRST_PEER = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
}


def run_ours(job: Job) -> dict:
    """Measure PreferenceTrainer, with its pass for reference log-probs."""
    from benchmarks.measure import Clock, StepMeter, result

    clock, meter = Clock(), StepMeter(job.warmup_steps)
    our_trainer(job, [meter], clock).train()
    return result(meter, first=FIRST_OURS, before=clock.times(measured_share(job, job.examples())))


def our_trainer(job: Job, callbacks: Sequence[Any], clock: Any, **more: Any) -> Any:
    """Make a PreferenceTrainer, its reference pass on `clock`; `more` changes its settings."""
    from functools import partial

    from datasets import Dataset

    from benchmarks.ours import settings
    from posttrain.losses import dpo_loss
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.trainers.fit import training_arguments
    from posttrain.trainers.preference import PreferenceTrainer

    class TimedTrainer(PreferenceTrainer):
        def _find_reference(self, *arguments: Any, **settings: Any) -> None:
            with clock:
                super()._find_reference(*arguments, **settings)

    config = settings(job, **more)
    return TimedTrainer(
        load_model(config),
        training_arguments(config),
        pairs=Dataset.from_list(job.examples()),
        tokenizer=load_tokenizer(job.model),
        loss=partial(dpo_loss, beta=BETA),
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        callbacks=callbacks,
    )


def run_peer(job: Job) -> dict:
    """Measure TRL's DPOTrainer, with its pass for reference log-probs."""
    from benchmarks.measure import Clock, StepMeter, result

    clock, meter = Clock(), StepMeter(job.warmup_steps)
    peer_trainer(job, [meter], clock).train()
    return result(meter, first=FIRST_PEER, before=clock.times(measured_share(job, job.examples())))


def peer_trainer(job: Job, callbacks: Sequence[Any], clock: Any, **more: Any) -> Any:
    """Make TRL's DPOTrainer, its reference pass on `clock`; `more` changes its settings."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from benchmarks import peer

    class TimedTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # holds token ids already

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            with clock:
                return super()._precompute_ref_logps(*arguments)

    micro_batch = job.setting["micro_batch"]
    arguments = peer.arguments(
        DPOConfig,
        job,
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=job.setting["precomputed"],
        **peer.cut(job, micro_batch),
        **more,
    )
    length = None if micro_batch == job.batch_size else longest
    pairs = peer.flat(peer.batches(job, length=length))
    return TimedTrainer(
        peer.load_causal(job),
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=peer.load_tokenizer(job),
        callbacks=callbacks,
    )


def longest(pair: dict) -> int:
    """Tokens of the prompt with its longer completion, to which TRL pads the completions."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def measured_share(job: Job, pairs: list[dict]) -> float:
    """Share of the tokens of all pairs that belong to measured steps."""
    tokens = [work(pair).tokens for pair in pairs]
    return sum(tokens[job.warmup_steps * job.batch_size :]) / sum(tokens)


make_examples = read_or_made(read_pairs, made_pairs)


def work(pair: dict) -> Work:
    """Count the work on a pair, whose prompt is shared."""
    prompt, *completions = (len(pair[column]) for column in COLUMNS)
    return shared_prompt(prompt, completions)


def useful_flops(work: Work, size: Size) -> int:
    """Count the operations of training and of the reference pass."""
    return work.training_flops(size) + work.forward_flops(size)  # and the reference


def main(config: Config) -> dict:
    """Run the benchmark, and return its report."""
    batch_size = config.batch_size or BATCH
    return run(
        config,
        Benchmark(
            name="dpo",
            what="DPO with its reference pass, TRL's DPOTrainer as the peer",
            batch_size=BATCH,
            make_examples=make_examples,
            work=work,
            useful_flops=useful_flops,
            ours="benchmarks.dpo:run_ours",
            peer="benchmarks.dpo:run_peer",
            usual=Setting("one micro-batch", {"micro_batch": batch_size, "precomputed": False}),
            candidates=[
                Setting(
                    f"reference precomputed, {m} pairs at once",
                    {"micro_batch": m, "precomputed": True},
                )
                for m in halves(batch_size)
            ],
        ),
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
