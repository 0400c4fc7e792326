"""Process supervision: advantages of tokens from a reward at the end of each step.

    prm = load_process_reward(config, tokenizer)                  # posttrain.models
    rollouts = Rollouts(…, advantage=StepAdvantages(prm.steps))

The rewards of a group's steps are known on the rank that has the group, so no rank waits for
another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from posttrain.advantages import process_advantages
from posttrain.rollouts.group import Group

# Of one completion: the index of each step's last token, and each step's reward.
Steps = tuple[list[int], list[float]]
StepRewards = Callable[[Sequence[list[int]], Sequence[list[int]]], list[Steps]]


class StepAdvantages:
    """An advantage f(groups) -> (G, T) for each, see `posttrain.rollouts.group`.

    Args:
        steps: f(prompt_ids, completion_ids) -> the steps of each completion.
        advantage: f((P, G, T) rewards of steps, NaN at other tokens) -> (P, G, T).
    """

    def __init__(
        self, steps: StepRewards, advantage: Callable[[Tensor], Tensor] = process_advantages
    ) -> None:
        self.steps, self.advantage = steps, advantage

    def __call__(self, groups: Sequence[Group]) -> list[Tensor]:
        """Score the steps of all completions, and return each group's advantages."""
        flat = [
            (group.prompt["prompt_ids"], completion.token_ids)
            for group in groups
            for completion in group.completions
        ]
        found = iter(self.steps(*map(list, zip(*flat, strict=True))))
        return [self._of_group(group, [next(found) for _ in group.completions]) for group in groups]

    def _of_group(self, group: Group, steps: list[Steps]) -> Tensor:
        longest = max(len(c.token_ids) for c in group.completions)
        rewards = torch.full((1, len(steps), longest), torch.nan)
        for row, (ends, values) in enumerate(steps):
            rewards[0, row, ends] = torch.tensor(values)
        return self.advantage(rewards)[0]
