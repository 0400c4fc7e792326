"""From the rewards of drawn groups to the advantages that train: one an answer, or one a token.

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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.advantages import rlhf_token_rewards
from posttrain.errors import ConfigError
from posttrain.ranks import from_all_ranks, rank_and_world
from posttrain.rollouts.rollout import DrawnGroup

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
