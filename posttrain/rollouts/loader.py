"""Rollouts are the dataloader: prompts in, packed training groups out.

Each rollout takes the next prompts of this rank, draws G answers to each, scores them and turns
the scores into advantages. What it yields are batches of groups:

    {"prompt_ids": […], "answers": [[…], …], "sampled_logps": [[…], …], "advantages": […]}

Everything is a function of the seed and the step, so that a resumed run draws the same prompts and
numbers, and a group is the same on whichever rank it is drawn. A group never straddles ranks.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.rewards.scoring import Scores, score
from posttrain.rollouts.sampling import Completion, Sampling

SEED_STRIDE = 1_000_003  # a prime: neighbouring run seeds share no answer seeds


@dataclass(frozen=True)
class RolloutPlan:
    """How many prompts a rollout has, and how it is cut into batches.

    prompts_per_batch: prompts of this rank in one accumulation step. batches_per_rollout:
    accumulation steps × optimizer steps that one rollout serves.
    """

    prompts_per_batch: int
    batches_per_rollout: int
    seed: int
    rank: int = 0
    world_size: int = 1

    @property
    def prompts_per_rollout(self) -> int:
        """Of all ranks."""
        return self.prompts_per_batch * self.batches_per_rollout * self.world_size

    def positions(self, rollout: int) -> list[int]:
        """This rank's places in the endless order of prompts, batch by batch.

        A batch of all ranks takes neighbouring prompts, so that more ranks, or more accumulation
        steps, cut the same optimizer batch in another way.
        """
        size = self.prompts_per_batch
        first = rollout * self.prompts_per_rollout
        return [
            first + (batch * self.world_size + self.rank) * size + i
            for batch in range(self.batches_per_rollout)
            for i in range(size)
        ]


@dataclass
class Rollout:
    """Answers of one rank to its prompts, and what the rewards said of them."""

    prompts: list[dict]
    completions: list[list[Completion]]  # (P, G)
    texts: list[str]  # P * G, decoded without special tokens
    scores: Scores
    rewards: Tensor  # (P, G), NaN where an answer could not be scored
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def answers(self) -> list[Completion]:
        return [answer for siblings in self.completions for answer in siblings]


class PromptOrder:
    """The endless order of prompts: each pass over the data shuffled anew, by the seed alone."""

    def __init__(self, num_prompts: int, seed: int) -> None:
        self.num_prompts, self.seed = num_prompts, seed
        self._pass, self._order = -1, []

    def __getitem__(self, position: int) -> int:
        number, offset = divmod(position, self.num_prompts)
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + number)
            self._order = torch.randperm(self.num_prompts, generator=generator).tolist()
            self._pass = number
        return self._order[offset]


def roll_out(
    generator: Any,
    tokenizer: Any,
    prompts: Sequence[dict],
    *,
    rewards: Mapping[str, tuple[Callable, float]],
    sampling: Sampling,
    answers_per_prompt: int,
    seeds: Sequence[int],
) -> Rollout:
    """Draw `answers_per_prompt` answers to each prompt and score them."""
    start = time.perf_counter()
    completions = generator.generate(
        [prompt["prompt_ids"] for prompt in prompts], sampling, answers_per_prompt, seeds=seeds
    )
    answers = [answer for siblings in completions for answer in siblings]
    texts = tokenizer.batch_decode([a.token_ids for a in answers], skip_special_tokens=True)
    generated = time.perf_counter()
    repeated = [prompt for prompt in prompts for _ in range(answers_per_prompt)]
    names = [name for name in prompts[0] if name != "prompt"]
    scores = score(
        rewards,
        texts,
        prompts=[prompt["prompt"] for prompt in repeated],
        completion_ids=[answer.token_ids for answer in answers],
        columns={name: [prompt[name] for prompt in repeated] for name in names},
    )
    matrix = torch.tensor(scores.totals).view(len(prompts), answers_per_prompt)
    seconds = {"generate": generated - start, "reward": time.perf_counter() - generated}
    return Rollout(list(prompts), completions, texts, scores, matrix, seconds)


def all_ranks(rewards: Tensor) -> tuple[Tensor, slice]:
    """Every rank's (P, G) rewards, stacked, and where this rank's lie.

    Advantages that look across groups (batch statistics) then see the whole batch. Every rank has
    equally many prompts.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rewards, slice(None)
    stacked: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(stacked, rewards)
    start = dist.get_rank() * len(rewards)
    return torch.cat(stacked), slice(start, start + len(rewards))


class RolloutLoader:
    """Yields batches of groups for ever; `on_rollout` hears of each rollout before it trains.

    make_rollout: f(prompts, seeds) -> Rollout, by the policy of the moment.
    advantage: f((P, G) rewards) -> (P, G). finish_batch: f(groups) -> groups, called for every
    batch of a rollout before the first one is trained on. first_rollout: where a resumed run
    goes on.
    """

    def __init__(
        self,
        prompts: Any,
        plan: RolloutPlan,
        *,
        make_rollout: Callable[[list[dict], list[int]], Rollout],
        advantage: Callable[[Tensor], Tensor],
        on_rollout: Callable[[Rollout, Tensor], None],
        finish_batch: Callable[[list[dict]], list[dict]],
        first_rollout: int = 0,
    ) -> None:
        if plan.prompts_per_rollout > len(prompts):
            raise ConfigError(
                f"a rollout takes {plan.prompts_per_rollout} prompts, and the data has "
                f"{len(prompts)}. Lower the batch size, or add prompts."
            )
        self.prompts, self.plan = prompts, plan
        self.order = PromptOrder(len(prompts), plan.seed)
        self.make_rollout, self.advantage = make_rollout, advantage
        self.on_rollout, self.finish_batch = on_rollout, finish_batch
        self.first_rollout = first_rollout

    def __iter__(self) -> Iterator[list[dict]]:
        rollout = self.first_rollout
        while True:
            groups = self._groups(rollout)
            size = self.plan.prompts_per_batch
            starts = range(0, len(groups), size)
            yield from [self.finish_batch(groups[start : start + size]) for start in starts]
            rollout += 1

    def _groups(self, number: int) -> list[dict]:
        positions = self.plan.positions(number)
        prompts = [self.prompts[self.order[position]] for position in positions]
        seeds = [self.plan.seed * SEED_STRIDE + position for position in positions]
        rollout = self.make_rollout(prompts, seeds)
        everyone, mine = all_ranks(rollout.rewards)
        advantages = self.advantage(everyone)[mine]
        self.on_rollout(rollout, advantages)
        return [
            {
                "prompt_ids": prompt["prompt_ids"],
                "answers": [answer.token_ids for answer in siblings],
                "sampled_logps": [answer.logps for answer in siblings],
                "advantages": row.tolist(),
            }
            for prompt, siblings, row in zip(
                rollout.prompts, rollout.completions, advantages, strict=True
            )
        ]
