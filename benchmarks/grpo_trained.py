"""Whole GRPO steps of a trained model, ours with guesses against TRL's GRPOTrainer at its best.

    python -m benchmarks.grpo_trained --model runs/lookahead/model --lookahead auto
    python -m benchmarks.grpo_trained --model runs/lookahead/model --lookahead none

As `benchmarks.grpo --whole_step`, but for the model: one that was trained, and so ends its
completions itself, and whose tokens can be guessed. The two sides sample other tokens of the same
distribution; how many tokens a completion has in the mean is in the report of each side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.child import Job
from benchmarks.groups import (
    NUM_GENERATIONS,
    PROMPTS,
    GroupConfig,
    our_trainer,
    peer_trainer,
    work,
)
from benchmarks.grpo import whole_step_flops
from benchmarks.harness import Benchmark, Setting, run
from benchmarks.peer import halves
from benchmarks.workload import SIZES, Size
from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import LookaheadName

USUAL_TOKENS = 34  # of a completion of the quickstart's model, for the count of operations alone


@dataclass(kw_only=True)
class TrainedConfig(GroupConfig):
    """Settings of the benchmark of a trained model."""

    size: Literal[tuple(SIZES)] = option("tiny", "size that operations are counted for")
    model: str = option("runs/lookahead/model", "folder of the model, with or without heads")
    lookahead: LookaheadName = option("auto", "what guesses on our side")
    problems: str = option("data/problems.jsonl", "problems: file, folder or Hub name")


def make_groups(count: int, config: TrainedConfig, _: Size, folder: Path) -> list[dict]:
    """Make groups of a problem's prompt, and completions of the usual length."""
    from posttrain.data import load_prompts
    from posttrain.models.load import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    rows = load_prompts(config.problems, tokenizer, template="r1_zero", say=lambda _: None)
    prompts, usual = rows.select(range(count))["prompt_ids"], [[2] * USUAL_TOKENS] * NUM_GENERATIONS
    return [{"prompt_ids": ids, "completions": usual} for ids in prompts]


def step_ours(job: Job) -> dict:
    """Measure whole steps of RLTrainer, with guesses or without."""
    from benchmarks.measure import StepMeter
    from posttrain.models.beside import heads_beside
    from posttrain.rollouts.options import lookahead_of

    values = dict(job.setting)
    lookahead = lookahead_of(values.pop("lookahead"), lambda: heads_beside(job.model))
    job, meter = replace(job, setting=values), StepMeter(job.warmup_steps)
    trainer = our_trainer(job, [meter], lookahead=lookahead)
    trainer.train()
    return _result(meter, trainer, "mean_completion_tokens")


def step_peer(job: Job) -> dict:
    """Measure whole steps of TRL's GRPOTrainer."""
    from benchmarks.measure import StepMeter

    meter = StepMeter(job.warmup_steps)
    trainer = peer_trainer(job, [meter])
    trainer.train()
    return _result(meter, trainer, "completions/mean_length")


def _result(meter: Any, trainer: Any, name: str) -> dict:
    """What was measured, and the mean length of a completion in each logged step."""
    from benchmarks.measure import result

    lengths: Sequence[float] = [log[name] for log in trainer.state.log_history if name in log]
    return {**result(meter, first={}), "mean_completion_tokens": lengths}


def main(config: TrainedConfig) -> dict:
    """Run the benchmark, and return its report."""
    completions = (config.batch_size or PROMPTS) * NUM_GENERATIONS
    return run(
        config,
        Benchmark(
            name="grpo_trained",
            what=f"GRPO, a whole step of {config.model}, lookahead {config.lookahead}, TRL's "
            "GRPOTrainer as the peer",
            batch_size=PROMPTS,
            make_examples=make_groups,
            make_model=lambda *_, **__: Path(config.model),
            work=work,
            useful_flops=whole_step_flops,
            ours="benchmarks.grpo_trained:step_ours",
            peer="benchmarks.grpo_trained:step_peer",
            usual=Setting("one micro-batch", {"micro_batch": completions}),
            candidates=[
                Setting(f"{m} completions at once", {"micro_batch": m}) for m in halves(completions)
            ],
            our_values={"lookahead": config.lookahead},
        ),
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(TrainedConfig))
