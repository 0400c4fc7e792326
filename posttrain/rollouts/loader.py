"""Rollouts are the dataloader: prompts in, packed training groups out.

Each rollout takes the next prompts of this rank, draws G answers to each, scores them and turns
the scores into advantages. What it yields are batches of groups, `DrawnGroup.training_record`s.

Everything is a function of the seed and the step, so that a resumed run draws the same prompts and
numbers, and a group is the same on whichever rank it is drawn. A group never straddles ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.ranks import any_rank
from posttrain.rollouts.credit import Penalties, assign_advantages
from posttrain.rollouts.rollout import DrawnGroup, Rollout

REFILL_POSITION = 2**41  # where the places of refills begin, far from those of any run's prompts
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


@dataclass(frozen=True)
class Selection:
    """Which of the drawn groups and answers train.

    max_refills: dynamic sampling (DAPO, arXiv 2503.14476 section 3.2): a group whose answers all
    got the same reward teaches nothing, so others are drawn for it, in up to so many rounds; 0
    keeps what was drawn. spread_of: the reward whose spread counts, such as "accuracy", since a
    length penalty always has some; None: the total. drop_truncated: overlong filtering (DAPO,
    section 3.4): answers that were cut count in their group's statistics and do not train.
    """

    max_refills: int = 0
    spread_of: str | None = None
    drop_truncated: bool = False

    def __post_init__(self) -> None:
        if self.max_refills < 0:
            raise ConfigError(f"max_refills: expected at least 0, found {self.max_refills}.")


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


def no_penalties(_: list[DrawnGroup]) -> None:
    """Rewards as they are."""


class RolloutLoader:
    """Yields batches of groups for ever; `on_rollout` hears of all answers before any trains.

    make_rollout: f(prompts, seeds) -> Rollout, by the policy of the moment. All ranks call it
    equally often, with no prompts where they need none. advantage: see `credit`. penalise:
    f(groups) -> what their tokens' rewards are lowered by, None for nothing; called by all ranks.
    finish_batch: f(groups) -> groups, called for every batch of a rollout before the first one is
    trained on. selection: which groups and answers train. first_rollout: where a resumed run goes
    on.
    """

    def __init__(
        self,
        prompts: Any,
        plan: RolloutPlan,
        *,
        make_rollout: Callable[[list[dict], list[int]], Rollout | None],
        advantage: Callable[[Tensor], Tensor],
        on_rollout: Callable[[Rollout], None],
        finish_batch: Callable[[list[dict]], list[dict]],
        selection: Selection = Selection(),
        penalise: Callable[[list[DrawnGroup]], Penalties | None] = no_penalties,
        first_rollout: int = 0,
    ) -> None:
        if plan.prompts_per_rollout > len(prompts):
            raise ConfigError(
                f"a rollout takes {plan.prompts_per_rollout} prompts, and the data has "
                f"{len(prompts)}. Lower the batch size, or add prompts."
            )
        self.prompts, self.plan, self.selection = prompts, plan, selection
        self.order = PromptOrder(len(prompts), plan.seed)
        self.make_rollout, self.advantage = make_rollout, advantage
        self.on_rollout, self.finish_batch = on_rollout, finish_batch
        self.penalise, self.first_rollout = penalise, first_rollout

    def __iter__(self) -> Iterator[list[dict]]:
        number = self.first_rollout
        while True:
            yield from [self.finish_batch(batch) for batch in self._batches(number)]
            number += 1

    def _batches(self, number: int) -> list[list[dict]]:
        rollouts = self.draw(number)
        for rollout in rollouts:
            self.on_rollout(rollout)
        drawn = self._selected(rollouts)
        advantages = assign_advantages(drawn, self.advantage, self.penalise(drawn))
        size = self.plan.prompts_per_batch
        pairs = list(zip(drawn, advantages, strict=True))
        return [self._batch(pairs[start : start + size]) for start in range(0, len(pairs), size)]

    def _batch(self, pairs: list[tuple[DrawnGroup, list]]) -> list[dict]:
        if not self.selection.drop_truncated:
            return [group.training_record(advantages) for group, advantages in pairs]
        whole = [(group, advantages, group.whole_answers()) for group, advantages in pairs]
        kept = [group.training_record(a, rows) for group, a, rows in whole if rows]
        # A rank must have something to run: where every answer was cut, one group, at advantage 0.
        group, advantages = pairs[0]
        nothing = [[0.0] * len(a) if isinstance(a, list) else 0.0 for a in advantages]
        return kept or [group.training_record(nothing)]

    def draw(self, number: int) -> list[Rollout]:
        """This rank's answers of a rollout, then those drawn for groups without spread, round by
        round."""
        plan, refills = self.plan, self.selection.max_refills
        rollouts = [self._answer(plan.positions(number))]
        for attempt in range(refills):
            groups = [g for rollout in rollouts for g in rollout.groups(self.selection.spread_of)]
            missing = len(rollouts[0].prompts) - sum(group.has_spread for group in groups)
            if not any_rank(missing > 0):
                break
            place = (number * refills + attempt) * plan.world_size + plan.rank
            first = REFILL_POSITION + place * len(rollouts[0].prompts)
            rollout = self._answer(range(first, first + missing))
            rollouts += [rollout] if rollout else []
        return rollouts

    def _answer(self, positions: Sequence[int]) -> Rollout | None:
        """This rank's answers to the prompts at these places of their order."""
        prompts = [self.prompts[self.order[position]] for position in positions]
        seeds = [self.plan.seed * SEED_STRIDE + position for position in positions]
        return self.make_rollout(prompts, seeds)

    def _selected(self, rollouts: list[Rollout]) -> list[DrawnGroup]:
        """As many groups as the first rollout has: with refills, those with spread first.

        Where the last round left too few, groups without spread fill up: they teach nothing, and
        keep the batch its size.
        """
        groups = [g for rollout in rollouts for g in rollout.groups(self.selection.spread_of)]
        if self.selection.max_refills:
            groups.sort(key=lambda group: not group.has_spread)
        return groups[: len(rollouts[0].prompts)]
