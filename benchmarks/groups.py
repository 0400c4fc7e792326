"""Shared by the RL benchmarks: prompts with planned completions, a reward, both sides' settings.

An example is `{"prompt_ids", "completions"}`: a prompt and NUM_GENERATIONS completions, of GSM8K's
lengths but at most MAX_COMPLETION tokens. Learning trains on these very completions. Generation
samples others of the same lengths: a model of random weights does not stop by itself, so on both
sides the end-of-sequence token is sampled where the plan says, and nowhere before.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.child import Job
from benchmarks.flops import Work, shared_prompt
from benchmarks.harness import Config
from benchmarks.workload import (
    EOS_ID,
    Size,
    made_documents,
    read_documents,
    read_or_made,
    shuffled,
)
from posttrain.run.options import option

PROMPTS, NUM_GENERATIONS, MAX_COMPLETION = 4, 8, 128
MANY = 500  # documents that prompts and completions are taken from
NO_EARLY_STOP = 0.01  # far above the probability of one token among thousands, at random weights


@dataclass(kw_only=True)
class GroupConfig(Config):
    """Settings of benchmarks whose examples are groups."""

    full_length: bool = option(False, "all completions have 128 tokens")


def make_groups(count: int, config: GroupConfig, size: Size, folder: Path) -> list[dict]:
    """Make groups of a document's prompt and the truncated completions of random documents."""
    documents = read_or_made(read_documents, made_documents)(MANY, config, size, folder)
    texts = [_parted(document) for document in documents]
    dice = random.Random(config.seed)
    return [
        {
            "prompt_ids": prompt,
            "completions": [
                _cut(dice.choice(texts)[1], config.full_length, dice, size)
                for _ in range(NUM_GENERATIONS)
            ],
        }
        for prompt, _ in shuffled(texts, count, seed=config.seed)
    ]


def _parted(document: dict) -> tuple[list[int], list[int]]:
    start = document["trained"].index(True)
    return document["input_ids"][:start], document["input_ids"][start:]


def _cut(completion: list[int], full_length: bool, dice: random.Random, size: Size) -> list[int]:
    """Truncate to MAX_COMPLETION tokens; with `full_length` extend to as many, without an end."""
    if full_length:
        missing = MAX_COMPLETION - len(completion) + 1
        completion = completion[:-1] + [dice.randrange(2, size.vocabulary) for _ in range(missing)]
    return completion[:MAX_COMPLETION]


def work(group: dict) -> Work:
    """Count the work on a group."""
    return shared_prompt(
        len(group["prompt_ids"]), [len(completion) for completion in group["completions"]]
    )


def parity_reward(*, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 for a completion with an even sum of token ids, which is cheap and differs in a group."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


# Our side.


def our_trainer(
    job: Job,
    callbacks: Sequence[Any],
    *,
    reward: Callable = parity_reward,
    sampling: Any = None,
    lookahead: Any = None,
    **more: Any,
) -> Any:
    """Make an RLTrainer with GRPO's advantage and clip, a mean over tokens, rewards in-process.

    sampling: by default that of the planned completions. lookahead: guesses tokens. `more` changes
    other settings.
    """
    from benchmarks.ours import settings
    from posttrain.advantages import group_advantages
    from posttrain.losses import clipped_policy_loss
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.rewards.call import Scoring
    from posttrain.rollouts.options import RolloutOptions
    from posttrain.rollouts.source import Rollouts
    from posttrain.trainers.fit import training_arguments
    from posttrain.trainers.objective import Objective
    from posttrain.trainers.rl import RLTrainer

    config = settings(job, per_device_train_batch_size=job.batch_size * NUM_GENERATIONS, **more)
    tokenizer = load_tokenizer(job.model)
    rollouts = Rollouts(
        our_prompts(job, tokenizer, config.seed),
        {reward.__name__: (reward, 1.0)},
        sampling or our_sampling(),
        num_generations=NUM_GENERATIONS,
        advantage=group_advantages,
        options=RolloutOptions(scoring=Scoring(num_workers=0), lookahead=lookahead),
    )
    return RLTrainer(
        load_model(config),
        training_arguments(config),
        rollouts,
        Objective(clipped_policy_loss),
        tokenizer=tokenizer,
        callbacks=callbacks,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )


def our_sampling() -> Any:
    """Return the sampling settings of our side."""
    from posttrain.rollouts.sampling import Sampling

    return Sampling(max_tokens=MAX_COMPLETION, stop_ids=(EOS_ID,))


def our_prompts(job: Job, tokenizer: Any, seed: int) -> Any:
    """Return the prompts, placed so that the shuffled order of rollouts restores their order."""
    from datasets import Dataset

    from posttrain.rollouts.options import PromptOrder

    groups = job.examples()
    order = PromptOrder(len(groups), seed)
    rows: list[Any] = [None] * len(groups)
    for position, group in enumerate(groups):
        ids = group["prompt_ids"]
        row = {"prompt_ids": ids, "prompt": tokenizer.decode(ids)}
        rows[order[position]] = row | group.get("columns", {})
    return Dataset.from_list(rows)


def plan_our_completions(job: Job) -> Any:
    """Return a context in which our generator samples EOS where the plan says."""
    groups = job.examples()
    return plan_seeded(
        lambda seeds: [
            len(completion) for seed in seeds for completion in groups[seed]["completions"]
        ]
    )


def plan_seeded(lengths_of: Callable[[Sequence[int]], list[int]]) -> Any:
    """Return a context in which our generator samples EOS after so many tokens of each completion.

    A token is found by inverting the distribution at a number of a table, one for each completion
    and position. EOS has id 0: the number 0 samples it, and numbers above its small probability
    never do.
    """
    from unittest.mock import patch

    from posttrain.rollouts import generator, sampling

    def planned(seeds: Sequence[int], num_generations: int, max_tokens: int) -> Any:
        table = sampling.uniforms(seeds, num_generations, max_tokens).clamp(min=NO_EARLY_STOP)
        for row, length in enumerate(lengths_of(seeds)):
            if length < max_tokens:
                table[row, length - 1] = 0.0
        return table

    return patch.object(generator, "uniforms", planned)


# TRL's side.


def peer_trainer(
    job: Job,
    callbacks: Sequence[Any],
    rollout_func: Any = None,
    *,
    reward: Callable = parity_reward,
    **more: Any,
) -> Any:
    """Make a GRPOTrainer with its defaults: a mean over tokens, group advantages, no reference."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks import peer

    micro_batch, tokenizer = job.setting["micro_batch"], peer.load_tokenizer(job)
    arguments = peer.arguments(
        GRPOConfig,
        job,
        num_generations=NUM_GENERATIONS,
        shuffle_dataset=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=job.batch_size * NUM_GENERATIONS // micro_batch,
        **{"max_completion_length": MAX_COMPLETION, **more},
    )
    prompts = [
        {"prompt": tokenizer.decode(group["prompt_ids"])} | group.get("columns", {})
        for group in job.examples()
    ]
    return GRPOTrainer(
        peer.load_causal(job),
        reward,
        args=arguments,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        rollout_func=rollout_func,
        callbacks=callbacks,
    )


def plan_peer_completions(model: Any, lengths: Sequence[Sequence[int]]) -> None:
    """Make `model.generate` sample EOS as planned: `lengths[i]` for the rows of its i-th call."""
    from transformers import LogitsProcessorList

    plain, calls = model.generate, iter(lengths)

    def generate(**inputs: Any) -> Any:
        planned = partial(force_stops, next(calls), inputs["input_ids"].shape[1])
        return plain(**inputs, logits_processor=LogitsProcessorList([planned]))

    model.generate = generate


def force_stops(lengths: Sequence[int], prompt_slots: int, input_ids: Any, scores: Any) -> Any:
    """Process logits: only EOS in the rows whose last token is due, never EOS before."""
    position = input_ids.shape[1] - prompt_slots + 1
    scores[:, EOS_ID] = -float("inf")
    for row in (row for row, length in enumerate(lengths) if length == position):
        scores[row] = -float("inf")
        scores[row, EOS_ID] = 0.0
    return scores
