"""GRPO on GSM8K, 4 prompts x 8 completions of at most 128 tokens: ours against TRL's GRPOTrainer.

    python -m benchmarks.grpo --data ../gsm8k/train.jsonl               learning alone
    python -m benchmarks.grpo --data ../gsm8k/train.jsonl --whole_step  with generation

Learning alone: both sides are handed the same recorded completions (TRL by its `rollout_func`, ours
in place of its generator), and everything else of a step is measured: rewards, advantages, batches,
forward, backward, clipping, AdamW. A whole step also generates completions, of planned lengths,
with each trainer's own generation; `benchmarks.rollout` measures that alone. One update for each
rollout, no reference, loss a mean over tokens. TRL's settings that are searched: micro-batches of
several sizes with accumulation. (It pads all completions of a rollout alike before it cuts and
shuffles them, so that sorting by length would change nothing.) Gradient checkpointing is off on
both sides.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.child import Job
from benchmarks.flops import Work
from benchmarks.groups import (
    NUM_GENERATIONS,
    PROMPTS,
    GroupConfig,
    make_groups,
    our_trainer,
    peer_trainer,
    plan_our_completions,
    plan_peer_completions,
    work,
)
from benchmarks.harness import Benchmark, Setting, run
from benchmarks.peer import halves
from benchmarks.workload import Size
from posttrain.run.options import option, parse, plain_errors

LEARNING = {"loss": "loss", "grad_norm": "grad_norm", "entropy": "entropy", "reward": "reward"}
# The two sides sample different tokens; their number is planned.
WHOLE_OURS = {"mean_completion_tokens": "mean_completion_tokens", "entropy": "entropy"}
WHOLE_PEER = {"completions/mean_length": "mean_completion_tokens", "entropy": "entropy"}


@dataclass(kw_only=True)
class GrpoConfig(GroupConfig):
    """Settings of the GRPO benchmark."""

    whole_step: bool = option(False, "measure generation too")


def learn_ours(job: Job) -> dict:
    """Measure RLTrainer on recorded completions."""
    from benchmarks.measure import StepMeter, result

    meter = StepMeter(job.warmup_steps)
    with recorded_completions(job):
        our_trainer(job, [meter]).train()
    return result(meter, first=LEARNING)


def recorded_completions(job: Job) -> Any:
    """Return a context in which our generator returns the completions of the job's examples."""
    from unittest.mock import patch

    from posttrain.rollouts.generator import HFGenerator
    from posttrain.rollouts.sampling import Completion

    groups = job.examples()

    def recorded(
        _: Any, _prompts: Any, _sampling: Any, _count: int, *, seeds: list[int]
    ) -> list[list[Completion]]:
        return [
            [_completion(completion) for completion in groups[seed]["completions"]]
            for seed in seeds
        ]

    def _completion(completion: list[int]) -> Completion:
        return Completion(completion, [0.0] * len(completion), [0.0] * len(completion), "stop")

    return patch.object(HFGenerator, "generate", recorded)


def learn_peer(job: Job) -> dict:
    """Measure TRL's GRPOTrainer on recorded completions."""
    from benchmarks.measure import StepMeter, result

    groups, meter = iter(job.examples()), StepMeter(job.warmup_steps)

    def recorded(prompts: list[str], _: Any) -> dict[str, Any]:
        batch = [next(groups) for _ in range(len(prompts) // NUM_GENERATIONS)]
        return {
            "prompt_ids": [group["prompt_ids"] for group in batch for _ in group["completions"]],
            "completion_ids": [
                completion for group in batch for completion in group["completions"]
            ],
            "logprobs": None,
        }

    peer_trainer(job, [meter], rollout_func=recorded).train()
    return result(meter, first=LEARNING)


def step_ours(job: Job) -> dict:
    """Measure whole steps of RLTrainer, generation included."""
    from benchmarks.measure import StepMeter, result

    meter = StepMeter(job.warmup_steps)
    with plan_our_completions(job):
        our_trainer(job, [meter]).train()
    return result(meter, first=WHOLE_OURS)


def step_peer(job: Job) -> dict:
    """Measure whole steps of TRL's GRPOTrainer, generation included."""
    from benchmarks.measure import StepMeter, result

    meter = StepMeter(job.warmup_steps)
    trainer = peer_trainer(job, [meter])
    lengths = [len(completion) for group in job.examples() for completion in group["completions"]]
    size = job.batch_size * NUM_GENERATIONS
    plan_peer_completions(
        trainer.model, [lengths[i : i + size] for i in range(0, len(lengths), size)]
    )
    trainer.train()
    return result(meter, first=WHOLE_PEER)


def whole_step_flops(work: Work, size: Size) -> int:
    """Count the operations of training and of generation."""
    return work.training_flops(size) + work.forward_flops(size)  # and generation


def main(config: GrpoConfig) -> dict:
    """Run the benchmark, and return its report."""
    batch_size = config.batch_size or PROMPTS
    completions = batch_size * NUM_GENERATIONS
    part = "step" if config.whole_step else "learn"
    measured = "a whole step" if config.whole_step else "learning from recorded completions"
    return run(
        config,
        Benchmark(
            name="grpo_step" if config.whole_step else "grpo",
            what=f"GRPO, {measured}, TRL's GRPOTrainer as the peer",
            batch_size=PROMPTS,
            make_examples=make_groups,
            work=work,
            useful_flops=whole_step_flops if config.whole_step else Work.training_flops,
            ours=f"benchmarks.grpo:{part}_ours",
            peer=f"benchmarks.grpo:{part}_peer",
            usual=Setting("one micro-batch", {"micro_batch": completions}),
            candidates=[
                Setting(f"{m} completions at once", {"micro_batch": m}) for m in halves(completions)
            ],
        ),
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(GrpoConfig))
