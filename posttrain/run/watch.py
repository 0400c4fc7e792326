"""Checks that read the metrics of an RL run and report in plain words what to do about it.

    watch = Watch(parts=("accuracy", "format"))
    for line in lines:                     # one dict of metrics for each log line
        for finding in watch.read(line):
            print(finding)                 # warning  entropy collapse: …
    watch.active                           # names of what holds now

A check looks at the lines so far and returns a sentence while its condition holds. The sentence is
reported once, when that begins. The condition has ended when a milder one no longer holds, and may
then be reported again. Checks need only the metrics, so they can be tested by hand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Line = Mapping[str, float]
Lines = Sequence[Line]

DONE = 0.9  # accuracy from which on symptoms are those of a task that is nearly solved
NO_SPREAD, NO_SPREAD_OVER = 0.8, 0.6  # share of groups: 0.8 wastes four fifths of the samples
TRUNCATED, TRUNCATED_OVER = 0.2, 0.1  # share of completions: a tenth is what long tails bring along
LOW_ENTROPY, LOW_ENTROPY_OVER = 0.2, 0.3  # of the first line's: it falls while a policy gets better
# nats that do no harm
KL_FLOORS = {"kl": (0.1, "token"), "kl_per_completion": (10.0, "completion")}
KL_GROWTH = 3.0  # times the median so far: a jump, not a drift
RATIO_OUTSIDE, RATIO_OUTSIDE_OVER = 0.05, 0.02  # share of tokens: bf16 alone puts a few there
LONGER, LONGER_OVER = 1.15, 1.1  # times the first line's: more than means of answers waver by
PART_UP, MAIN_FLAT = 0.2, 0.02  # change of a reward: clear of the noise, and within it
FIRST_LINES = 4  # fewer lines show no trend
ZERO_LOSS = 0.005  # is printed as 0.00


class Finding(NamedTuple):
    """A sentence about the run; `kind` is "warning" or "note"."""

    kind: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind:8}{self.name}: {self.text}"


class Check(NamedTuple):
    """A condition on the log lines so far.

    `says` is f(lines, parts, holds) -> a sentence while the condition holds, else None. `parts` are
    the names of the rewards, the main one first; `holds` is True if the condition held on the line
    before, so that the milder condition for ending applies.
    """

    kind: str
    name: str
    says: Callable[[Lines, Sequence[str], bool], str | None]


class Watch:
    """Reads a run line by line. `parts` are the names of the rewards, the main one first."""

    def __init__(self, parts: Sequence[str] = ()) -> None:
        self.parts, self.lines = tuple(parts), []
        self.active: list[str] = []
        self.counts: Counter[str] = Counter()  # lines on which each warning held

    def read(self, line: Line) -> list[Finding]:
        """Return the findings that begin to hold with this line."""
        self.lines.append(dict(line))
        begun, active = [], []
        for check in CHECKS:
            text = check.says(self.lines, self.parts, check.name in self.active)
            if text is None:
                continue
            active.append(check.name)
            self.counts[check.name] += check.kind == "warning"
            if check.name not in self.active:
                begun.append(Finding(check.kind, check.name, text))
        self.active = active
        return begun

    @property
    def num_warnings(self) -> int:
        """Number of warnings that hold now; notes do not count."""
        kinds = {check.name: check.kind for check in CHECKS}
        return sum(kinds[name] == "warning" for name in self.active)


def course(lines: Lines, name: str) -> list[float]:
    """Return a metric's values on the lines that have it."""
    found = [line.get(name) for line in lines]
    return [x for x in found if isinstance(x, (int, float)) and math.isfinite(x)]


def last(lines: Lines, name: str) -> float | None:
    """Return a metric's value on the last line, or None if it is not there."""
    values = course(lines[-1:], name)
    return values[0] if values else None


def zero_loss(lines: Lines, _parts: Sequence[str], holds: bool) -> str | None:
    """Explain a loss near 0, which is right at the first update of a rollout."""
    loss, norm = last(lines, "loss"), last(lines, "grad_norm")
    of_groups = last(lines, "reward_std_zero") is not None
    if loss is None:
        return None
    if not holds and (norm == 0 or abs(loss) >= ZERO_LOSS or not of_groups):
        return None
    gradient = "" if norm is None else f" (grad_norm {norm:.2g})"
    return (
        f"{loss:.3f} is expected. At the first update of a rollout the ratio is 1 and advantages "
        f"cancel within a group; their gradient does not{gradient}. Progress is the reward"
    )


def no_gradient(lines: Lines, _parts: Sequence[str], holds: bool) -> str | None:
    """Warn of a loss and gradient of exactly 0: nothing is learnt."""
    still = [line for line in lines[-3 if holds else -1 :] if _stands_still(line)]
    if not still:
        return None
    return (
        "loss and gradient are exactly 0: no completion had an advantage. See "
        "reward_std_zero and unscored in metrics.jsonl; take other problems, or rewards that "
        "tell completions apart"
    )


def no_spread(lines: Lines, parts: Sequence[str], holds: bool) -> str | None:
    """Warn if most groups have a reward standard deviation of zero."""
    shares = course(lines, "reward_std_zero")[-2:]
    if len(shares) < 2 or min(shares) < (NO_SPREAD_OVER if holds else NO_SPREAD):
        return None
    found = (
        f"in {shares[-1]:.0%} of the groups all completions got the same reward and teach nothing. "
    )
    if _is_done(lines, parts):
        return found + "Nearly all are right: stop, or give harder problems"
    return found + (
        "Take easier problems, more completions per prompt, or sample again (recipes/grpo.py: "
        "--max_refills 3)"
    )


def truncated(lines: Lines, _parts: Sequence[str], holds: bool) -> str | None:
    """Warn of many completions that reach the length limit."""
    shares = course(lines, "truncated")
    falls = len(shares) > 1 and shares[-1] < 0.8 * shares[-2]
    if len(shares) < 2 or shares[-1] < (TRUNCATED_OVER if holds else TRUNCATED):
        return None
    if falls and not holds:  # a base model that learns to end its completions
        return None
    return (
        f"{shares[-1]:.0%} of the completions reached --max_completion_length and do not end. "
        "Raise it, let length cost, or keep them out of training (recipes/grpo.py: "
        "--overlong_tokens, --drop_truncated)"
    )


def entropy_collapse(lines: Lines, parts: Sequence[str], holds: bool) -> str | None:
    """Warn if the entropy falls far below its start before the task is solved."""
    values = course(lines, "entropy")
    share = LOW_ENTROPY_OVER if holds else LOW_ENTROPY
    if len(values) < FIRST_LINES or values[-1] > share * values[0] or _is_done(lines, parts):
        return None
    return (
        f"{values[-1]:.2g} nats, from {values[0]:.2g} at the start, and the task is not done: the "
        "policy repeats itself. Take smaller steps, raise --temperature, or pay for entropy "
        "(recipes/grpo.py: --clip_high, --entropy_coef)"
    )


def kl_runaway(lines: Lines, _parts: Sequence[str], holds: bool) -> str | None:
    """Warn if the KL to the reference jumps to a multiple of its median."""
    for name, (floor, unit) in KL_FLOORS.items():
        values = course(lines, name)
        if len(values) < FIRST_LINES or values[-1] < floor:
            continue
        median = sorted(values[:-1])[len(values[:-1]) // 2]
        if holds or values[-1] > KL_GROWTH * median:
            return (
                f"{values[-1]:.2g} nats a {unit} to the reference, from {median:.2g} before. Take "
                "smaller steps, or raise the weight of the KL"
            )
    return None


def first_ratio(lines: Lines, _parts: Sequence[str], holds: bool) -> str | None:
    """Warn if training and sampling disagree about probabilities before any update."""
    shares = course(lines, "ratio_outside")
    if not shares or shares[-1] < (RATIO_OUTSIDE_OVER if holds else RATIO_OUTSIDE):
        return None
    found = (
        f"before any update {shares[-1]:.0%} of the tokens have a ratio outside [0.9, 1.1] to when "
        "they were sampled: {}. Compare temperature, dtype and weights of the sampler and the "
        "trainer"
    )
    if course(lines, "correction"):
        return found.format("the correction weighs them, at the cost of a noisier gradient")
    return found.format("the gradient is biased") + (
        ", or weight each token (recipes/grpo.py: --correction tis)"
    )


def disagreement(lines: Lines, parts: Sequence[str], holds: bool) -> str | None:
    """Warn if a lesser reward rises and the main one does not: the policy learns what is easier."""
    if len(parts) < 2 or _is_done(lines, parts):
        return None
    main, slack = _change(lines, parts[0]), 2 if holds else 1
    if main is None or main > MAIN_FLAT * slack:
        return None
    risen = [(part, _change(lines, part) or 0.0) for part in parts[1:]]
    part, change = max(risen, key=lambda pair: pair[1])
    if change < PART_UP / slack:
        return None
    return (
        f"{part} rose by {change:.2f}, {parts[0]} by {main:.2f}: the easier reward is learnt and "
        f"the other is not. Lower the weight of {part}, or take easier problems"
    )


def longer(lines: Lines, parts: Sequence[str], holds: bool) -> str | None:
    """Note that completions grow, and whether the main reward grows with them."""
    lengths = course(lines, "mean_completion_tokens")
    if len(lengths) < FIRST_LINES:
        return None
    factor = min(lengths[-2:]) / max(lengths[0], 1)
    if factor < (LONGER_OVER if holds else LONGER):
        return None
    change = _change(lines, parts[0]) if parts else None
    better = change is not None and change > MAIN_FLAT
    found = f"from {lengths[0]:.0f} to {lengths[-1]:.0f} tokens, "
    if better:
        return found + f"while {parts[0]} rises: longer reasoning pays, as in R1-Zero's figure 3"
    return found + "and no better for it. See samples.jsonl; Dr. GRPO, or a length reward, helps"


def _stands_still(line: Line) -> bool:
    return line.get("loss") == line.get("grad_norm") == 0


def _is_done(lines: Lines, parts: Sequence[str]) -> bool:
    """The main reward is as good as 1. One without that bound is never done."""
    best = last(lines, parts[0]) if parts else None
    return best is not None and DONE <= best <= 1


def _change(lines: Lines, name: str) -> float | None:
    """Mean of the last two values less that of the first two; None before there are enough."""
    values = course(lines, name)
    if len(values) < FIRST_LINES:
        return None
    return sum(values[-2:]) / 2 - sum(values[:2]) / 2


CHECKS = (
    Check("note", "loss", zero_loss),
    Check("warning", "no gradient", no_gradient),
    Check("warning", "groups of equal rewards", no_spread),
    Check("warning", "truncated answers", truncated),
    Check("warning", "entropy collapse", entropy_collapse),
    Check("warning", "KL runaway", kl_runaway),
    Check("warning", "ratio at the first update", first_ratio),
    Check("warning", "rewards that disagree", disagreement),
    Check("note", "longer answers", longer),
)
