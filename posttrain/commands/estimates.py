"""Estimates from several samples of each problem, with intervals: pass@k, maj@k, best of k.

    pass_at_k(num_samples=4, num_right=1, k=2)                      # 0.5
    best_of_k(scores=[3, 2, 1], rewards=[0.0, 1.0, 0.0], k=2)       # 1/3
    over_problems("pass@2", [0.5, 1.0, 0.0])                        # an Estimate

The first three are numbers of one problem, each the expected value for k of its n samples, k <= n.
The problems are the sample that an interval is about: the samples of one problem are not
independent of each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, fsum, isnan, nan, sqrt
from typing import NamedTuple

from posttrain.errors import DataError

SCORE = "score"  # the reward that chooses the best of k
Z = 1.959963984540054  # a normal variable is within ±Z with probability 0.95


@dataclass
class Problem:
    """The samples of one problem.

    Attributes:
        parts: For each reward one value a sample; None where it could not be scored.
        lengths: Tokens of each sample.
        votes: The number of each sample's final answer; None without one.
    """

    parts: dict[str, list[float | None]]
    lengths: list[int]
    votes: list[int | None]


class Estimate(NamedTuple):
    """A mean over problems, with its 95 % confidence interval.

    Attributes:
        name: Its name, such as "pass@8".
        value: The mean.
        low: The interval's lower end; NaN where there is none.
        high: The interval's upper end.
        method: "Wilson", "normal", or "one problem": no interval.
    """

    name: str
    value: float
    low: float
    high: float
    method: str


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Compute 1 - C(n - c, k) / C(n, k): the probability that some of k samples is right, without
    bias, from n samples of which c are right.

    Exact: binomials are integers. By hand: n = 4, c = 1, k = 2 give 1 - 3/6 = 0.5. 1 - (1 - c/n)^k
    would be too low. Raises ValueError for k outside of 1 to n.
    Source: Codex (2107.03374) Eq. 1.
    """
    _check_k(k, num_samples)
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)


def best_of_k(scores: Sequence[float], rewards: Sequence[float], k: int) -> float:
    """Compute the expected reward of the sample that scores highest among k of the n samples.

    The mean over all C(n, k) subsets, exactly: the highest score is at most s in C(m, k) of them,
    where m samples score at most s. Between equal scores it is drawn by lot. By hand: scores
    (3, 2, 1), rewards (0, 1, 0), k = 2: the first is in two of three subsets, so 1/3. With scores
    equal to rewards of 0 and 1 it is pass@k. Raises ValueError for k outside of 1 to n.
    """
    _check_k(k, len(scores))
    total, below, num_seen = 0.0, 0, 0
    for score in sorted(set(scores)):
        tied = [reward for own, reward in zip(scores, rewards, strict=True) if own == score]
        num_seen += len(tied)
        up_to = comb(num_seen, k)
        total += (up_to - below) / comb(len(scores), k) * fsum(tied) / len(tied)
        below = up_to
    return total


def majority_at_k(votes: Sequence[int | None], rewards: Sequence[float], k: int) -> float:
    """Compute the expected reward of the answer that most of k samples give.

    `votes` names each sample's answer by a number, None without one: such a sample has no vote.
    Among answers with equally many votes the one sampled first wins; where nobody votes, the
    window's first sample stands. It is the mean over n windows of k samples in order, the last of
    which go on from the first sample: no bias, and each sample counts alike. By hand: votes
    (0, 1, 1) with rewards (1, 0, 0) give, for k = 3, 0, and for k = 1 and 2, 1/3. Raises ValueError
    for k outside of 1 to n. Source: self-consistency (2203.11171).
    """
    _check_k(k, len(votes))
    rows = [*zip(votes, rewards, strict=True)] * 2
    return fsum(_winner(rows[start : start + k]) for start in range(len(votes))) / len(votes)


def _winner(window: Sequence[tuple[int | None, float]]) -> float:
    """The reward of the first sample with the answer that has the most votes."""
    counts = Counter(vote for vote, _ in window if vote is not None)
    if not counts:
        return window[0][1]
    ((most, _),) = counts.most_common(1)  # of equal counts the first that was met
    return next(reward for vote, reward in window if vote == most)


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k: expected 1 to {num_samples}, the number of samples; found {k}.")


def wilson_interval(num_right: int, total: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share.

    It stays within 0 and 1 and is no point where all are right or none. By hand: with z² = 3.8415,
    0 of 10 gives (0, z² / (10 + z²)) = (0, 0.2775).
    Source: Wilson (1927), Probable inference, JASA 22.
    """
    share, z2 = num_right / total, Z * Z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z / (1 + z2 / total) * sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def over_problems(name: str, values: Sequence[float]) -> Estimate:
    """Average one number for each problem, with a 95 % interval.

    Wilson's where every problem's number is 0 or 1, as with a single sample; else the normal one,
    mean ± 1.96 s / sqrt(P) with s² the unbiased variance over the P problems. By hand: values
    (0, 0.5, 1) have s = 0.5 and give 0.5 ± 0.566.
    """
    mean = fsum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        return Estimate(name, mean, *wilson_interval(round(fsum(values)), len(values)), "Wilson")
    if len(values) == 1:
        return Estimate(name, mean, nan, nan, "one problem")
    variance = fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = Z * sqrt(variance / len(values))
    return Estimate(name, mean, mean - half, mean + half, "normal")


def estimates(problems: Sequence[Problem], ks: Sequence[int]) -> list[Estimate]:
    """Average over problems: each reward, pass@k, maj@k, best of k, tokens; with 95 % intervals.

    A sample is right, for pass@k, from an accuracy of 1; maj@k and best of k are mean accuracies.
    There is no maj@k where no sample has a final answer.

    Args:
        problems: those of which every sample was scored by every reward; with an accuracy.
        ks: each from 1 to the number of samples.
    """
    rows = [(p.parts["accuracy"], p.parts.get(SCORE), p.votes) for p in problems]
    is_voted = any(vote is not None for _, _, votes in rows for vote in votes)
    found = [over_problems("accuracy", [_mean(accuracy) for accuracy, _, _ in rows])]
    for k in ks:
        right = [pass_at_k(len(a), sum(x >= 1 for x in a), k) for a, _, _ in rows]
        found.append(over_problems(f"pass@{k}", right))
    for k in ks if is_voted else ():
        majority = [majority_at_k(votes, accuracy, k) for accuracy, _, votes in rows]
        found.append(over_problems(f"maj@{k}", majority))
    for k in ks if SCORE in problems[0].parts else ():
        best = [best_of_k(scores, accuracy, k) for accuracy, scores, _ in rows]
        found.append(over_problems(f"best_of_{k}", best))
    for name in (name for name in problems[0].parts if name not in ("accuracy", SCORE)):
        found.append(over_problems(name, [_mean(p.parts[name]) for p in problems]))
    lengths = [_mean(problem.lengths) for problem in problems]
    return [*found, over_problems("mean_completion_tokens", lengths)]


def table(problems: Sequence[Problem], ks: Sequence[int]) -> list[str]:
    """Write the estimates as lines, after a line that counts the problems.

    Raises DataError where not one problem could be scored.
    """
    whole = [p for p in problems if all(None not in values for values in p.parts.values())]
    if not whole:
        raise DataError(
            f"expected problems whose completions can be scored, found none among {len(problems)}: "
            "their rewards gave None, failed or were too late."
        )
    left_out = len(problems) - len(whole)
    samples = len(whole[0].lengths)
    counted = f", {left_out} left out: a sample could not be scored" if left_out else ""
    head = f"{'problems':24}{len(whole)}, samples of each: {samples}{counted}"
    return [head, *map(_line, estimates(whole, ks))]


def _line(found: Estimate) -> str:
    name, *numbers, method = found
    form = "{:.1f}" if name.endswith("tokens") else "{:.1%}"
    value, low, high = map(form.format, numbers)
    interval = f"no interval: {method}" if isnan(found.low) else f"{low} to {high}  {method}"
    return f"{name:24}{value:8}{interval}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
