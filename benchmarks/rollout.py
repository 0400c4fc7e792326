"""Generate 8 completions of at most 128 tokens for each of 4 prompts: ours against TRL's way.

    python -m benchmarks.rollout --data ../gsm8k/train.jsonl
    python -m benchmarks.rollout --data ../gsm8k/train.jsonl --full_length

Completions have planned lengths, the same on both sides (benchmarks.groups). TRL without an
inference engine hands left-padded prompts, each repeated for its completions, to `model.generate`;
so does the peer here, with TRL's sampling settings. Its settings that are searched: rows at once, a
static cache and, in bfloat16, weights that are held in it. (Under autocast a static cache fails:
keys and values then differ in dtype.) Ours also returns the log-prob of every token sampled, which
TRL computes elsewhere.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.child import Job
from benchmarks.flops import Work
from benchmarks.groups import (
    MAX_COMPLETION,
    NUM_GENERATIONS,
    PROMPTS,
    GroupConfig,
    make_groups,
    our_sampling,
    plan_our_completions,
    plan_peer_completions,
    work,
)
from benchmarks.harness import Benchmark, Setting, run
from benchmarks.peer import halves
from benchmarks.report import DisagreementError
from benchmarks.workload import EOS_ID, PAD_ID
from posttrain.run.options import parse, plain_errors


def run_ours(job: Job) -> dict:
    """Measure our decode loop."""
    from benchmarks.ours import settings
    from posttrain.models.load import load_model
    from posttrain.rollouts.generator import HFGenerator

    generator, batches = HFGenerator(load_model(settings(job))), _batches(job)

    def sample(number: int) -> list[list[int]]:
        prompts = [group["prompt_ids"] for group in batches[number]]
        seeds = range(number * job.batch_size, (number + 1) * job.batch_size)
        sampled = generator.generate(prompts, our_sampling(), NUM_GENERATIONS, seeds=seeds)
        return [completion.token_ids for siblings in sampled for completion in siblings]

    with plan_our_completions(job):
        return _measured(job, sample)


def run_peer(job: Job) -> dict:
    """Measure transformers' generate, called as TRL calls it."""
    from transformers import GenerationConfig

    from benchmarks import peer
    from posttrain.run.engine import this_device

    model, batches = peer.load_causal(job).to(this_device()).eval(), _batches(job)
    if job.setting.get("held_in_half"):
        model = model.bfloat16()
    rows = job.setting["rows"]
    chunks = [
        [
            (group["prompt_ids"], len(completion))
            for group in batch
            for completion in group["completions"]
        ]
        for batch in batches
    ]
    plan = [[n for _, n in c[i : i + rows]] for c in chunks for i in range(0, len(c), rows)]
    plan_peer_completions(model, plan)
    sampling = GenerationConfig(
        max_new_tokens=MAX_COMPLETION,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        cache_implementation=job.setting.get("cache"),
    )

    def sample(number: int) -> list[list[int]]:
        prompts, completions = [prompt for prompt, _ in chunks[number]], []
        for start in range(0, len(prompts), rows):
            inputs = _padded(prompts[start : start + rows])
            output = model.generate(**inputs, generation_config=sampling)
            completions += output[:, inputs["input_ids"].shape[1] :].tolist()
        return [_ended(completion) for completion in completions]

    return _measured(job, sample)


def _batches(job: Job) -> list[list[dict]]:
    from benchmarks import peer

    return peer.batches(job)


def _padded(prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return left-padded ids and their mask, on the device that computes."""
    import torch

    from posttrain.run.engine import this_device

    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD_ID] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids.to(this_device()), "attention_mask": mask.to(this_device())}


def _ended(completion: list[int]) -> list[int]:
    return completion[: completion.index(EOS_ID) + 1] if EOS_ID in completion else completion


def _measured(job: Job, sample: Any) -> dict:
    """Sample all batches, time those after the warm-up, and count the first one's tokens."""
    import torch

    from benchmarks.measure import Clock, peak_gigabytes
    from posttrain.run.engine import this_device

    clock, sampled = Clock(), []
    casts = job.is_half and not job.setting.get("held_in_half")
    with torch.no_grad(), torch.autocast(this_device().type, torch.bfloat16, enabled=casts):
        for number in range(job.warmup_steps + job.steps):
            if number < job.warmup_steps:
                sampled.append(sample(number))
                continue
            with clock:
                sampled.append(sample(number))
    planned = [len(completion) for group in job.examples() for completion in group["completions"]]
    found = [len(completion) for batch in sampled for completion in batch]
    if found != planned:
        raise DisagreementError(f"expected completions of {planned} tokens, found {found}.")
    return {
        "cpu_seconds": clock.cpu,
        "wall_seconds": clock.wall,
        "peak_gb": peak_gigabytes(),
        "first": {"completion_tokens": sum(map(len, sampled[0]))},
    }


def main(config: GroupConfig) -> dict:
    """Run the benchmark, and return its report."""
    batch_size = config.batch_size or PROMPTS
    completions = batch_size * NUM_GENERATIONS
    lengths = "all of full length" if config.full_length else "of varied length"
    by_rows = [Setting(f"{m} rows at once", {"rows": m}) for m in halves(completions)[:4]]
    static, name = {"rows": completions, "cache": "static"}, "all rows at once, static cache"
    others = [Setting(name, static)]
    if config.dtype == "bfloat16":
        half = {"held_in_half": True}
        others = [
            Setting("all rows at once, weights in bfloat16", {"rows": completions, **half}),
            Setting(f"{name}, weights in bfloat16", static | half),
        ]
    return run(
        config,
        Benchmark(
            name="rollout_full" if config.full_length else "rollout",
            what=f"generation, completions {lengths}, transformers' generate as the peer",
            batch_size=PROMPTS,
            make_examples=make_groups,
            work=work,
            useful_flops=Work.forward_flops,
            ours="benchmarks.rollout:run_ours",
            peer="benchmarks.rollout:run_peer",
            usual=Setting("all rows at once", {"rows": completions}),
            candidates=[*by_rows, *others],
        ),
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(GroupConfig))
