"""Drawing 8 answers of at most 128 tokens to 4 prompts: ours against `generate` as TRL calls it.

    python -m benchmarks.rollout --data ../gsm8k/train.jsonl
    python -m benchmarks.rollout --data ../gsm8k/train.jsonl --full_length

Answers have planned lengths, the same on both sides (benchmarks.groups). TRL without an inference
engine hands left-padded prompts, each repeated for its answers, to `model.generate`; so does the
peer here, with TRL's sampling settings. Its settings that are searched: rows drawn at once, and a
static cache. Ours also returns the log-prob of every token drawn, which TRL computes elsewhere.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.child import Job
from benchmarks.flops import Work
from benchmarks.groups import (
    ANSWERS,
    MAX_ANSWER,
    PROMPTS,
    GroupConfig,
    make_groups,
    our_sampling,
    plan_our_answers,
    plan_peer_answers,
    work,
)
from benchmarks.harness import Benchmark, Setting, run
from benchmarks.peer import halves
from benchmarks.report import DisagreementError
from benchmarks.workload import EOS_ID, PAD_ID
from posttrain.run.options import parse, plain_errors


def run_ours(job: Job) -> dict:
    from benchmarks.ours import settings
    from posttrain.models.load import load_model
    from posttrain.rollouts.generator import HFGenerator

    generator, batches = HFGenerator(load_model(settings(job))), _batches(job)

    def draw(number: int) -> list[list[int]]:
        prompts = [group["prompt_ids"] for group in batches[number]]
        seeds = range(number * job.batch_size, (number + 1) * job.batch_size)
        drawn = generator.generate(prompts, our_sampling(), ANSWERS, seeds=seeds)
        return [answer.token_ids for siblings in drawn for answer in siblings]

    with plan_our_answers(job):
        return _measured(job, draw)


def run_peer(job: Job) -> dict:
    from transformers import GenerationConfig

    from benchmarks import peer
    from posttrain.run.engine import this_device

    model, batches = peer.load_causal(job).to(this_device()).eval(), _batches(job)
    rows = job.setting["rows"]
    chunks = [
        [(group["prompt_ids"], len(answer)) for group in batch for answer in group["answers"]]
        for batch in batches
    ]
    plan = [[n for _, n in c[i : i + rows]] for c in chunks for i in range(0, len(c), rows)]
    plan_peer_answers(model, plan)
    sampling = GenerationConfig(
        max_new_tokens=MAX_ANSWER, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
        eos_token_id=EOS_ID, pad_token_id=PAD_ID, cache_implementation=job.setting.get("cache"),
    )  # fmt: skip

    def draw(number: int) -> list[list[int]]:
        prompts, answers = [prompt for prompt, _ in chunks[number]], []
        for start in range(0, len(prompts), rows):
            inputs = _padded(prompts[start : start + rows])
            output = model.generate(**inputs, generation_config=sampling)
            answers += output[:, inputs["input_ids"].shape[1] :].tolist()
        return [_ended(answer) for answer in answers]

    return _measured(job, draw)


def _batches(job: Job) -> list[list[dict]]:
    from benchmarks import peer

    return peer.batches(job)


def _padded(prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Left-padded ids and their mask, on the device that computes."""
    import torch

    from posttrain.run.engine import this_device

    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD_ID] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids.to(this_device()), "attention_mask": mask.to(this_device())}


def _ended(answer: list[int]) -> list[int]:
    return answer[: answer.index(EOS_ID) + 1] if EOS_ID in answer else answer


def _measured(job: Job, draw: Any) -> dict:
    """Draw all batches, time those after the warm-up, and count the first one's tokens."""
    import torch

    from benchmarks.measure import Clock, peak_gigabytes
    from posttrain.run.engine import this_device

    clock, drawn = Clock(), []
    with torch.no_grad(), torch.autocast(this_device().type, torch.bfloat16, enabled=job.is_half):
        for number in range(job.warmup_steps + job.steps):
            if number < job.warmup_steps:
                drawn.append(draw(number))
                continue
            with clock:
                drawn.append(draw(number))
    planned = [len(answer) for group in job.examples() for answer in group["answers"]]
    found = [len(answer) for batch in drawn for answer in batch]
    if found != planned:
        raise DisagreementError(f"answers of {found} tokens, planned were {planned}.")
    return {
        "cpu_seconds": clock.cpu,
        "wall_seconds": clock.wall,
        "peak_gb": peak_gigabytes(),
        "first": {"answer_tokens": sum(map(len, drawn[0]))},
    }


def main(config: GroupConfig) -> dict:
    batch_size = config.batch_size or PROMPTS
    answers = batch_size * ANSWERS
    lengths = "all of full length" if config.full_length else "of varied length"
    by_rows = [Setting(f"{m} rows at once", {"rows": m}) for m in halves(answers)[:4]]
    static = Setting("all rows at once, static cache", {"rows": answers, "cache": "static"})
    return run(
        config,
        Benchmark(
            name="rollout_full" if config.full_length else "rollout",
            what=f"generation, answers {lengths}, transformers' generate as the peer",
            batch_size=PROMPTS,
            make_examples=make_groups,
            work=work,
            useful_flops=Work.forward_flops,
            ours="benchmarks.rollout:run_ours",
            peer="benchmarks.rollout:run_peer",
            usual=Setting("all rows at once", {"rows": answers}),
            candidates=[*by_rows, static],
        ),
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(GroupConfig))
