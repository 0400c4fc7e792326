"""Which of the answers to one prompt become data: rules over their rewards and lengths.

    shortest_correct([1, 0, 1], [120, 90, 100], min_reward=1)           # [2]
    best_against_worst([1.2, 0.2, 0.0], [30, 40, 50], min_margin=0.5)   # [(0, 2)]

A rule takes the rewards of G answers, higher is better, and their lengths in tokens, in the order
they were drawn. It returns places in that order: of answers to fine-tune on, or pairs (chosen,
rejected). An answer is right from `min_reward` on: 1 is what rule rewards give, -inf calls every
answer right. What nobody should learn from (no reward, cut off, a repetition) is left out before,
by selection.py.
"""

from collections.abc import Callable, Sequence

Rule = Callable[[Sequence[float], Sequence[int]], list[int]]
PairRule = Callable[[Sequence[float], Sequence[int]], list[tuple[int, int]]]


def best(
    rewards: Sequence[float], _lengths: Sequence[int], *, min_reward: float = 1.0
) -> list[int]:
    """The right answer with the highest reward, of equals the first; none if none is right.

    Rewards 0.2, 1.2, 1.2 give [1]: lengths do not count, so no length is preferred.
    """
    right = _right(rewards, min_reward)
    return [max(right, key=rewards.__getitem__)] if right else []


def shortest_correct(
    rewards: Sequence[float], lengths: Sequence[int], *, min_reward: float = 1.0
) -> list[int]:
    """The shortest right answer, of equals the first; none if none is right.

    Lengths 120, 90, 100, of which the first and the last are right, give [2].
    Source: Kimi k1.5 (arXiv 2501.12599) section 2.4, shortest rejection sampling, with G = 8.
    """
    right = _right(rewards, min_reward)
    return [min(right, key=lengths.__getitem__)] if right else []


def all_correct(
    rewards: Sequence[float], _lengths: Sequence[int], *, min_reward: float = 1.0, limit: int = 4
) -> list[int]:
    """The first `limit` (at least 1) right answers, in the order drawn.

    Without a limit a prompt would count as often as it is easy. Right, wrong, right, right with
    limit 2 give [0, 2]. Source: DeepSeek-R1 (arXiv 2501.12948) section 2.3.3; the limit is ours.
    """
    return _right(rewards, min_reward)[:limit]


def best_against_worst(
    rewards: Sequence[float],
    _lengths: Sequence[int],
    *,
    min_reward: float = 1.0,
    min_margin: float = 0.5,
) -> list[tuple[int, int]]:
    """The answer with the highest reward against that with the lowest, of equals the first.

    None where the best is not right, or the two differ by less than `min_margin` (at least 0), or
    not at all. Rewards 0.2, 1.2, 0 with min_margin 1 give [(1, 2)], with min_margin 1.5 nothing.
    """
    if not rewards:
        return []
    places = range(len(rewards))
    chosen = max(places, key=rewards.__getitem__)
    rejected = min(places, key=rewards.__getitem__)
    margin = rewards[chosen] - rewards[rejected]
    is_pair = rewards[chosen] >= min_reward and margin > 0 and margin >= min_margin
    return [(chosen, rejected)] if is_pair else []


def shortest_against_longer(
    rewards: Sequence[float], lengths: Sequence[int], *, min_reward: float = 1.0, ratio: float = 1.5
) -> list[tuple[int, int]]:
    """The shortest right answer against each longer wrong one, and each right one that is at least
    `ratio` (above 1) times as long.

    Wrong answers that are shorter stay out: the paper calls only longer ones negative. Right 100,
    right 150, right 149, wrong 101, wrong 99 give [(0, 1), (0, 3)].
    Source: Kimi k1.5 (arXiv 2501.12599) section 2.4, DPO; "at least" at 1.5 times is our reading.
    """
    pairs = []
    for chosen in shortest_correct(rewards, lengths, min_reward=min_reward):
        for place, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
            bound = ratio * lengths[chosen] if reward >= min_reward else lengths[chosen] + 1
            if place != chosen and length >= bound:
                pairs.append((chosen, place))
    return pairs


def first_of_equals(texts: Sequence[str]) -> list[int]:
    """Places of the texts that no earlier one equals, white space at the ends aside."""
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        first.setdefault(text.strip(), place)
    return list(first.values())


def _right(rewards: Sequence[float], min_reward: float = 1.0) -> list[int]:
    return [place for place, reward in enumerate(rewards) if reward >= min_reward]
