"""LM head, log-prob of the target and backward pass alone: ours against TRL's chunked head.

    python -m benchmarks.losses                 4,096 tokens x hidden 1,024 x vocabulary 131,072
    python -m benchmarks.losses --size small

Both get the same hidden states, weight and targets, and form the gradients of all but the targets.
Ours is told that the loss is a mean, as SFT's is, and forms them in the forward pass.
TRL's head is ChunkedLogProbFunction, which all its trainers use, as it is called for a log-prob and
nothing else; its setting that is searched is the number of vocabulary entries at a time.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.child import Job
from benchmarks.flops import Work
from benchmarks.harness import Benchmark, Config, Setting, run
from benchmarks.workload import Size
from posttrain.run.options import parse, plain_errors

# Tokens, hidden size, vocabulary.
SHAPES = {
    "tiny": (512, 128, 4_096),
    "small": (4_096, 512, 16_384),
    "base": (4_096, 1_024, 131_072),
}
CHUNKS = (2_048, 8_192, 32_768)
DEFAULT_CHUNK = 0  # TRL's own


@dataclass(kw_only=True)
class HeadConfig(Config):
    """Settings of the LM-head benchmark."""

    size: Literal[tuple(SHAPES)] = "base"


def run_ours(job: Job) -> dict:
    """Measure our chunked head."""
    import torch

    from posttrain.packed.head import chunked_logps

    dtype = torch.bfloat16 if job.is_half else torch.float32

    def logps(hidden: Any, weight: Any, targets: Any) -> Any:
        return chunked_logps(hidden.to(dtype), weight, targets, equal_slopes=True).logps

    return _measured(job, logps)


def run_peer(job: Job) -> dict:
    """Measure TRL's chunked head."""
    import torch
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    from posttrain.run.engine import this_device

    chunk = job.setting["chunk"] or utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def logps(hidden: Any, weight: Any, targets: Any) -> Any:
        with torch.autocast(this_device().type, torch.bfloat16, enabled=job.is_half):
            return ChunkedLogProbFunction.apply(
                hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("log_probs",)
            )[0]

    return _measured(job, logps)


def _measured(job: Job, logps: Any) -> dict:
    import torch

    from benchmarks.measure import Clock, peak_gigabytes
    from posttrain.run.engine import this_device

    shape = job.examples()[0]
    tokens, width, vocabulary = shape["tokens"], shape["hidden"], shape["vocabulary"]
    torch.manual_seed(0)
    device = this_device()
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    clock, first = Clock(), {}
    for number in range(job.warmup_steps + job.steps):
        if number == job.warmup_steps:
            clock.start()
        hidden.grad = weight.grad = None
        loss = -logps(hidden, weight, targets).mean()
        loss.backward()
        if not first:
            norm = torch.stack((hidden.grad.norm(), weight.grad.norm())).norm()
            first = {"loss": loss.item(), "grad_norm": norm.item()}
    clock.stop()
    return {
        "cpu_seconds": clock.cpu,
        "wall_seconds": clock.wall,
        "peak_gb": peak_gigabytes(),
        "first": first,
    }


def make_shapes(count: int, config: Config, _size: Size, _folder: Path) -> list[dict]:
    """Make the examples, which are the shape itself."""
    tokens, hidden, vocabulary = SHAPES[config.size]
    return [{"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}] * count


def work(shape: dict) -> Work:
    """Count the tokens; the operations are those of the head alone."""
    return Work(shape["tokens"], shape["tokens"], 0)


def main(config: HeadConfig) -> dict:
    """Run the benchmark, and return its report."""
    tokens, hidden, vocabulary = SHAPES[config.size]
    return run(
        config,
        Benchmark(
            name="losses",
            what=f"head, log-prob and backward alone: {tokens:,} tokens x hidden {hidden:,} x "
            f"vocabulary {vocabulary:,}, TRL's chunked head as the peer",
            batch_size=1,
            make_model=lambda *_, **__: Path(),
            make_examples=make_shapes,
            work=work,
            useful_flops=lambda work, _: 6 * work.scored * hidden * vocabulary,
            ours="benchmarks.losses:run_ours",
            peer="benchmarks.losses:run_peer",
            usual=Setting("its own chunk", {"chunk": DEFAULT_CHUNK}),
            candidates=[
                Setting("its own chunk", {"chunk": DEFAULT_CHUNK}),
                *(Setting(f"chunks of {size:,}", {"chunk": size}) for size in CHUNKS),
            ],
        ),
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(HeadConfig))
