"""Turn the rewards of groups into advantages: one for each completion, or one for each token.

    assign_advantages(groups, group_advantages)            -> Group.advantages, (G,)
    assign_advantages(groups, reinforce_pp_advantages)     -> Group.columns["advantages"]

The names of an advantage's arguments say what it is a function of:

    f(rewards)                 (P, G) -> (P, G)                        GRPO, RLOO, …
    f(rewards, mask)           (P, G), (P*G, T) -> (P*G, T)            REINFORCE++-baseline
    f(token_rewards, mask)     (P*G, T), (P*G, T) -> (P*G, T)          REINFORCE++

`rewards` has NaN where a completion could not be scored; `token_rewards` has a completion's reward
at its last token, and 0 with a mask of 0 throughout where it has none. P counts the prompts of all
ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from posttrain.advantages import rlhf_token_rewards
from posttrain.errors import ConfigError
from posttrain.rollouts.group import Group
from posttrain.run.engine import from_all_ranks, rank_and_world

ARGUMENTS = (("rewards",), ("rewards", "mask"), ("token_rewards", "mask"))

Advantage = Callable[..., Tensor]
Penalties = Sequence[Sequence[Tensor]]  # per group and completion: (T,), taken off the rewards


def assign_advantages(
    groups: Sequence[Group], advantage: Advantage, penalties: Penalties | None = None
) -> None:
    """Give the groups of this rank their advantages, as a function of all ranks' rewards.

    A collective: all ranks call it.

    Raises:
        ConfigError: The advantage has other arguments than those above.
    """
    names = arguments_of(advantage)
    is_of_tokens = "mask" in names
    # The penalties' lengths are also those of the completions; other advantages need no tokens.
    if penalties is None:
        sizes = [[len(c.token_ids) * is_of_tokens for c in group.completions] for group in groups]
        penalties = [[torch.zeros(size) for size in row] for row in sizes]
    everyone = from_all_ranks(([group.rewards for group in groups], penalties))
    rewards = [row for theirs, _ in everyone for row in theirs]
    if not rewards:
        return
    first = sum(len(theirs) for theirs, _ in everyone[: rank_and_world()[0]])
    mine = slice(first, first + len(groups))
    inputs = _inputs(torch.stack(rewards), [group for _, theirs in everyone for group in theirs])
    found = advantage(*(inputs[name] for name in names))
    if not is_of_tokens:
        for group, row in zip(groups, found[mine], strict=True):
            group.advantages = row
        return
    per_token = found.view(len(rewards), len(rewards[0]), -1)[mine]  # (P*G, T) -> (P, G, T)
    for group, rows in zip(groups, per_token, strict=True):
        pairs = zip(rows, group.completions, strict=True)
        group.columns["advantages"] = [row[: len(c.token_ids)] for row, c in pairs]


def arguments_of(advantage: Advantage) -> tuple[str, ...]:
    """Return which of `ARGUMENTS` an advantage takes; a single argument may have any name."""
    parameters = inspect.signature(advantage).parameters.values()
    names = tuple(p.name for p in parameters if p.default is p.empty)
    names = ("rewards",) if len(names) == 1 and names != ("token_rewards",) else names
    if names not in ARGUMENTS:
        expected = " or ".join(f"f({', '.join(arguments)})" for arguments in ARGUMENTS)
        raise ConfigError(f"advantage: expected {expected}, found f({', '.join(names)}).")
    return names


def _inputs(rewards: Tensor, penalties: Penalties) -> dict[str, Tensor]:
    """Compute everything that an advantage may take, by the names of arguments."""
    rows = [row for group in penalties for row in group]
    penalty = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (P*G, T)
    lengths, scores = torch.tensor([len(row) for row in rows]), rewards.flatten()
    mask = (torch.arange(penalty.shape[1]) < lengths[:, None]) & ~scores.isnan()[:, None]
    token_rewards = rlhf_token_rewards(
        scores.nan_to_num(), penalty, torch.zeros_like(penalty), mask, kl_coef=1.0
    )
    whole = rewards - penalty.sum(1).view_as(rewards)
    return {"rewards": whole, "token_rewards": token_rewards, "mask": mask}
