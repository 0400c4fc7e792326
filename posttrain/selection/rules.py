"""Which of the answers to one prompt become data: rules over their rewards, lengths and rightness.

    shortest_correct([1, 0, 1], [120, 90, 100], [True, False, True])                      # [2]
    best_against_worst([1.2, 0.2, 0], [30, 40, 50], [True, False, False], min_margin=1)   # [(0, 2)]

A rule takes the total rewards of G answers, higher is better, their lengths in tokens, and which of
them are right, in the order they were drawn. It returns places in that order: of answers to
fine-tune on, or pairs (chosen, rejected). What is right is said by selection.py, and not always by
the total, to which a wrong answer's good format adds. What nobody should learn from (no reward, cut
off, a repetition) is left out there as well.
"""

from collections.abc import Callable, Sequence

Rule = Callable[[Sequence[float], Sequence[int], Sequence[bool]], list[int]]
PairRule = Callable[[Sequence[float], Sequence[int], Sequence[bool]], list[tuple[int, int]]]


def best(rewards: Sequence[float], _lengths: Sequence[int], right: Sequence[bool]) -> list[int]:
    """The right answer with the highest reward, of equals the first; none if none is right.

    Rewards 0.2, 1.2, 1.2, the last two right, give [1]: lengths do not count, so no length is
    preferred.
    """
    places = _places(right)
    return [max(places, key=rewards.__getitem__)] if places else []


def shortest_correct(
    _rewards: Sequence[float], lengths: Sequence[int], right: Sequence[bool]
) -> list[int]:
    """The shortest right answer, of equals the first; none if none is right.

    Lengths 120, 90, 100, of which the first and the last are right, give [2].
    Source: Kimi k1.5 (arXiv 2501.12599) section 2.4, shortest rejection sampling, with G = 8.
    """
    places = _places(right)
    return [min(places, key=lengths.__getitem__)] if places else []


def all_correct(
    _rewards: Sequence[float], _lengths: Sequence[int], right: Sequence[bool], *, limit: int = 4
) -> list[int]:
    """The first `limit` (at least 1) right answers, in the order drawn.

    Without a limit a prompt would count as often as it is easy. Right, wrong, right, right with
    limit 2 give [0, 2]. Source: DeepSeek-R1 (arXiv 2501.12948) section 2.3.3; the limit is ours.
    """
    return _places(right)[:limit]


def best_against_worst(
    rewards: Sequence[float],
    lengths: Sequence[int],
    right: Sequence[bool],
    *,
    min_margin: float = 0.5,
) -> list[tuple[int, int]]:
    """`best` against the answer with the lowest reward, of equals the first.

    None where no answer is right, or the two differ by less than `min_margin` (at least 0), or not
    at all. Rewards 0.2, 1.2, 0 with min_margin 1 give [(1, 2)], with min_margin 1.5 nothing.
    """
    pairs = []
    for chosen in best(rewards, lengths, right):
        rejected = min(range(len(rewards)), key=rewards.__getitem__)
        margin = rewards[chosen] - rewards[rejected]
        if margin > 0 and margin >= min_margin:
            pairs.append((chosen, rejected))
    return pairs


def shortest_against_longer(
    rewards: Sequence[float], lengths: Sequence[int], right: Sequence[bool], *, ratio: float = 1.5
) -> list[tuple[int, int]]:
    """The shortest right answer against each longer wrong one, and each right one that is at least
    `ratio` (above 1) times as long.

    Wrong answers that are shorter stay out: the paper calls only longer ones negative. Right 100,
    right 150, right 149, wrong 101, wrong 99 give [(0, 1), (0, 3)].
    Source: Kimi k1.5 (arXiv 2501.12599) section 2.4, DPO; "at least" at 1.5 times is our reading.
    """
    pairs = []
    for chosen in shortest_correct(rewards, lengths, right):
        for place, (is_right, length) in enumerate(zip(right, lengths, strict=True)):
            bound = ratio * lengths[chosen] if is_right else lengths[chosen] + 1
            if place != chosen and length >= bound:
                pairs.append((chosen, place))
    return pairs


def first_of_equals(texts: Sequence[str]) -> list[int]:
    """Places of the texts that no earlier one equals, white space at the ends aside."""
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        first.setdefault(text.strip(), place)
    return list(first.values())


def _places(right: Sequence[bool]) -> list[int]:
    return [place for place, is_right in enumerate(right) if is_right]
