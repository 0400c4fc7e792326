"""Rollouts are the dataloader: prompts in, packed training groups out.

Each rollout takes the next prompts of this rank, draws G answers to each, scores them and turns
the scores into advantages. What it yields are batches of groups, `DrawnGroup.training_record`s.

Everything is a function of the seed and the step, so that a resumed run draws the same prompts and
numbers, and a group is the same on whichever rank it is drawn. A group never straddles ranks.

From the rewards of drawn groups to the advantages that train: one an answer, or one a token.

    assign_advantages(groups, group_advantages)            -> per group, one number an answer
    assign_advantages(groups, reinforce_pp_advantages)     -> per group and answer, one a token

An advantage says by the names of its arguments what it is a function of:

    f(rewards)                 (P, G) -> (P, G)                        GRPO, RLOO, …
    f(rewards, mask)           (P, G), (P*G, T) -> (P*G, T)            REINFORCE++-baseline
    f(token_rewards, mask)     (P*G, T), (P*G, T) -> (P*G, T)          REINFORCE++

`rewards` has NaN where an answer could not be scored; `token_rewards` has an answer's reward at its
last token, and 0 with a mask of 0 throughout where it has none. P counts the prompts of all ranks,
each of which has equally many.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.advantages import rlhf_token_rewards
from posttrain.errors import ConfigError
from posttrain.rollouts.group import DrawnGroup, Rollout
from posttrain.rollouts.prompts import SEED_STRIDE, PromptOrder
from posttrain.run.ranks import any_rank, from_all_ranks, rank_and_world

REFILL_POSITION = 2**41  # where the places of refills begin, far from those of any run's prompts


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


ARGUMENTS = (("rewards",), ("rewards", "mask"), ("token_rewards", "mask"))
# Penalties of groups: per group and answer, what each token's reward is lowered by.
Penalties = Sequence[Sequence[Sequence[float]]]


def assign_advantages(
    groups: Sequence[DrawnGroup],
    advantage: Callable[..., Tensor],
    penalties: Penalties | None = None,
) -> list[list[Any]]:
    """For each group its answers' advantages, as numbers or as lists with a number a token.

    A collective: all ranks call it with equally many groups. Raises ConfigError for an advantage
    with other arguments than those above.
    """
    names = arguments_of(advantage)
    is_of_tokens = "mask" in names
    if penalties is None:
        penalties = [[[0.0] * len(a.token_ids) * is_of_tokens for a in g.answers] for g in groups]
    rewards = torch.stack([group.rewards for group in groups])
    rewards, penalties, mine = _of_all_ranks(rewards, penalties)
    inputs = _inputs(rewards, penalties)
    found = advantage(*(inputs[name] for name in names))
    if not is_of_tokens:
        return found[mine].tolist()
    per_token = found.view(*rewards.shape, -1)[mine].tolist()  # (P*G, T) -> (P, G, T)
    return [
        [row[: len(answer)] for row, answer in zip(rows, answers, strict=True)]
        for rows, answers in zip(per_token, penalties[mine], strict=True)
    ]


def arguments_of(advantage: Callable[..., Tensor]) -> tuple[str, ...]:
    """Which of `ARGUMENTS` it takes; a single argument may have any name."""
    parameters = inspect.signature(advantage).parameters.values()
    names = tuple(p.name for p in parameters if p.default is p.empty)
    names = ("rewards",) if len(names) == 1 and names != ("token_rewards",) else names
    if names not in ARGUMENTS:
        expected = " or ".join(f"f({', '.join(arguments)})" for arguments in ARGUMENTS)
        raise ConfigError(f"advantage: expected {expected}, found f({', '.join(names)}).")
    return names


def _inputs(rewards: Tensor, penalties: Penalties) -> dict[str, Tensor]:
    rows = [torch.tensor(answer) for group in penalties for answer in group]
    penalty = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (P*G, T)
    lengths, scores = torch.tensor([len(row) for row in rows]), rewards.flatten()
    mask = (torch.arange(penalty.shape[1]) < lengths[:, None]) & ~scores.isnan()[:, None]
    token_rewards = rlhf_token_rewards(
        scores.nan_to_num(), penalty, torch.zeros_like(penalty), mask, kl_coef=1.0
    )
    whole = rewards - penalty.sum(1).view_as(rewards)
    return {"rewards": whole, "token_rewards": token_rewards, "mask": mask}


def _of_all_ranks(rewards: Tensor, penalties: Penalties) -> tuple[Tensor, Penalties, slice]:
    """Every rank's, and where this rank's prompts lie among them."""
    everyone = from_all_ranks((rewards, penalties))
    first = rank_and_world()[0] * len(rewards)
    together = [group for _, theirs in everyone for group in theirs]
    return torch.cat([r for r, _ in everyone]), together, slice(first, first + len(rewards))
