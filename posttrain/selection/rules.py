"""Rules that choose which completions of a prompt become data.

    completions = Completions(rewards=[1, 0, 1], lengths=[120, 90, 100], right=[True, False, True])
    shortest_correct(completions)              # [2]: fine-tune on the third
    shortest_against_longer(completions)       # []: the first is not 1.5 times as long

A rule takes the Completions of one prompt. It returns indices of completions to fine-tune on, or
pairs (chosen, rejected) of indices. select.py decides what is right, and not always by the total
reward, to which the good format of a wrong completion adds; it also leaves out what nobody should
learn from: completions without a reward, truncated ones and repetitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Completions:
    """The G completions of one prompt, in the order in which they were sampled.

    Attributes:
        rewards: Total rewards; higher is better.
        lengths: Number of tokens.
        right: True where a completion counts as right.
    """

    rewards: Sequence[float]
    lengths: Sequence[int]
    right: Sequence[bool]

    def right_indices(self) -> list[int]:
        """Return the indices of the right completions."""
        return [index for index, is_right in enumerate(self.right) if is_right]


Rule = Callable[[Completions], list[int]]
PairRule = Callable[[Completions], list[tuple[int, int]]]


def best(completions: Completions) -> list[int]:
    """Choose the right completion with the highest reward, of equals the first; [] if none is
    right.

    Rewards 0.2, 1.2, 1.2, the last two right, give [1]: lengths do not count, so no length is
    preferred.
    """
    candidates = completions.right_indices()
    return [max(candidates, key=completions.rewards.__getitem__)] if candidates else []


def shortest_correct(completions: Completions) -> list[int]:
    """Choose the shortest right completion, of equals the first; [] if none is right.

    Lengths 120, 90, 100, of which the first and the last are right, give [2].
    Source: Kimi k1.5 (arXiv 2501.12599) section 2.4, shortest rejection sampling, with G = 8.
    """
    candidates = completions.right_indices()
    return [min(candidates, key=completions.lengths.__getitem__)] if candidates else []


def all_correct(completions: Completions, *, limit: int = 4) -> list[int]:
    """Choose the first `limit` (at least 1) right completions, in the order sampled.

    Without a limit, prompts would be represented in proportion to how easy they are. Right, wrong,
    right, right with limit 2 give [0, 2]. Source: DeepSeek-R1 (arXiv 2501.12948) section 2.3.3; the
    limit is ours.
    """
    return completions.right_indices()[:limit]


def best_against_worst(
    completions: Completions, *, min_margin: float = 0.5
) -> list[tuple[int, int]]:
    """Pair `best` with the completion that has the lowest reward, of equals the first.

    Gives no pair where no completion is right, or where the two rewards are equal or differ by less
    than `min_margin` (at least 0). Rewards 0.2, 1.2, 0, of which the second is right, give [(1, 2)]
    with min_margin 1 and nothing with min_margin 1.5.
    """
    rewards = completions.rewards
    pairs = []
    for chosen in best(completions):
        rejected = min(range(len(rewards)), key=rewards.__getitem__)
        margin = rewards[chosen] - rewards[rejected]
        if margin > 0 and margin >= min_margin:
            pairs.append((chosen, rejected))
    return pairs


def shortest_against_longer(
    completions: Completions, *, ratio: float = 1.5
) -> list[tuple[int, int]]:
    """Pair the shortest right completion with each longer wrong one, and with each right one that
    is at least `ratio` (above 1) times as long.

    Shorter wrong completions stay out: the paper calls only longer ones negative. Right 100,
    right 150, right 149, wrong 101, wrong 99 give [(0, 1), (0, 3)].
    Source: Kimi k1.5 (arXiv 2501.12599) section 2.4, DPO; "at least" at 1.5 times is our reading.
    """
    lengths = completions.lengths
    pairs = []
    for chosen in shortest_correct(completions):
        for index, is_right in enumerate(completions.right):
            bound = ratio * lengths[chosen] if is_right else lengths[chosen] + 1
            if index != chosen and lengths[index] >= bound:
                pairs.append((chosen, index))
    return pairs


def first_of_equals(texts: Sequence[str]) -> list[int]:
    """Return the indices of the texts that no earlier one equals, not counting white space at the
    ends."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(text.strip(), index)
    return list(first.values())
