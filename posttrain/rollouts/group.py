"""Answers drawn and scored: what a rank's policy said to its prompts, and what that is worth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from posttrain.rewards import tally
from posttrain.rewards.call import Scores, Scoring, start_scoring
from posttrain.rollouts.sampling import Completion, Sampling


@dataclass
class DrawnGroup:
    """One prompt, its G answers, their (G,) rewards, and whether these differ."""

    prompt: dict
    answers: list[Completion]
    rewards: Tensor
    has_spread: bool

    def training_record(self, advantages: list, rows: list[int] | None = None) -> dict:
        """What the trainer gets: of all answers, or of those in these places.

        advantages: of each answer a number, or a list with one for each of its tokens.
        """
        rows = list(range(len(self.answers))) if rows is None else rows
        answers = [self.answers[i] for i in rows]
        return {
            "prompt_ids": self.prompt["prompt_ids"],
            "answers": [answer.token_ids for answer in answers],
            "policy_logps": [answer.logps for answer in answers],
            "sampler_logps": [answer.sampler_logps for answer in answers],
            "advantages": [advantages[i] for i in rows],
        }

    def whole_answers(self) -> list[int]:
        """Places of the answers that were not cut."""
        return [i for i, answer in enumerate(self.answers) if answer.finish_reason == "stop"]


@dataclass
class Rollout:
    """Answers of one rank to its prompts, and what the rewards said of them."""

    prompts: list[dict]
    completions: list[list[Completion]]  # (P, G)
    texts: list[str]  # P * G, decoded without special tokens
    scores: Scores
    rewards: Tensor  # (P, G), NaN where an answer could not be scored
    seconds: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)  # how often each kind fell
    policy_version: int = 0  # optimizer steps that the policy which drew them had taken

    def groups(self, spread_of: str | None = None) -> list[DrawnGroup]:
        """One for each prompt; `spread_of`: the reward that `has_spread` looks at."""
        judged = self.rewards
        if spread_of is not None:
            values = [math.nan if v is None else v for v in self.scores.parts[spread_of]]
            judged = torch.tensor(values).view_as(self.rewards)
        rows = zip(self.prompts, self.completions, self.rewards, has_spread(judged), strict=True)
        return [DrawnGroup(p, answers, row, bool(spread)) for p, answers, row, spread in rows]

    @property
    def answers(self) -> list[Completion]:
        return [answer for siblings in self.completions for answer in siblings]


def has_spread(rewards: Tensor) -> Tensor:
    """(P, G) rewards -> (P,): do the scored answers (not NaN) of a group differ in reward?"""
    scored = ~rewards.isnan()
    highest = rewards.masked_fill(~scored, -torch.inf).amax(1)
    return highest > rewards.masked_fill(~scored, torch.inf).amin(1)


def cut_group(group: dict, max_tokens: int) -> list[dict]:
    """A training record as several with the same prompt, each within `max_tokens` packed tokens
    where a single answer is."""
    room = max_tokens - len(group["prompt_ids"])
    parts: list[list[int]] = [[]]
    load = 0
    for index, answer in enumerate(group["answers"]):
        if parts[-1] and load + len(answer) > room:
            parts.append([])
            load = 0
        parts[-1].append(index)
        load += len(answer)
    per_answer = [name for name in group if name != "prompt_ids"]
    return [
        {**group, **{name: [group[name][i] for i in part] for name in per_answer}} for part in parts
    ]


def success_rates(rollout: Rollout, reward: str) -> list[float | None]:
    """The mean of a reward over each group's scored answers, cut to [0, 1]; None without any."""
    scores = iter(rollout.scores.parts[reward])
    groups = [[next(scores) for _ in answers] for answers in rollout.completions]
    known = [[score for score in group if score is not None] for group in groups]
    return [min(max(sum(k) / len(k), 0.0), 1.0) if k else None for k in known]


def roll_out(
    generator: Any,
    tokenizer: Any,
    prompts: Sequence[dict],
    *,
    rewards: Mapping[str, tuple[Callable, float]],
    sampling: Sampling,
    num_generations: int,
    seeds: Sequence[int],
    scoring: Scoring | None = None,
    trainer_state: Any = None,
) -> Rollout:
    """Draw `num_generations` answers to each prompt and score them.

    What the generator cannot draw at once is scored while it draws the rest. trainer_state: for
    rewards that ask for it.
    """
    seconds = {"generate": 0.0}
    everything = len(prompts) * num_generations
    size = max(1, getattr(generator, "rows_at_once", everything) // num_generations)
    completions, texts, waiting = [], [], []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        begun = time.perf_counter()
        drawn = generator.generate(
            [p["prompt_ids"] for p in prompts[part]], sampling, num_generations,
            seeds=seeds[part],
        )  # fmt: skip
        ids = [answer.token_ids for siblings in drawn for answer in siblings]
        decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
        seconds["generate"] += time.perf_counter() - begun
        completions += drawn
        texts += decoded
        repeated = [prompt for prompt in prompts[part] for _ in range(num_generations)]
        columns = {name: [p[name] for p in repeated] for name in repeated[0] if name != "prompt"}
        waiting.append(
            start_scoring(
                rewards, decoded, prompts=[p["prompt"] for p in repeated], completion_ids=ids,
                columns={**columns, "trainer_state": trainer_state}, scoring=scoring,
            )
        )  # fmt: skip
    begun = time.perf_counter()
    scores = Scores.joined([wait() for wait in waiting])
    seconds["reward"] = time.perf_counter() - begun  # what generation did not hide
    matrix = torch.tensor(scores.totals).view(len(prompts), num_generations)
    verdicts = dict(tally.take())
    return Rollout(list(prompts), completions, texts, scores, matrix, seconds, verdicts)
