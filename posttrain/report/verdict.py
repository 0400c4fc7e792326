"""Did it work: the main metric before and after, with an interval, and a verdict in a sentence.

    wilson(0.9, 512)       # (0.871, 0.923): the 95 % interval of 461 right of 512
    headline_of(run, health)

The main metric is the first that the run has of: the main reward held out, the same in training,
pair accuracy, token accuracy (held out alone), loss. Held out, an interval is Wilson's for a share
of the held-out rows; in training it is that of the mean over the first or last tenth of the lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from posttrain.report.charts import short
from posttrain.report.metrics import series_of
from posttrain.report.model import Estimate, Headline, Health, Series, Verdict
from posttrain.report.run import Run

Z = 1.96  # of 95 %
SHARE_OF_LINES = 0.1
FEWEST_LINES = 3


class Goal(NamedTuple):
    """A metric that a run is for; `sign` is 1 where more is better."""

    name: str
    words: str
    sign: int


TOKEN_ACCURACY = Goal("token_accuracy", "token accuracy", 1)


class _Change(NamedTuple):
    goal: Goal
    of: str
    before: Estimate
    after: Estimate
    is_share: bool


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `count`, or of a mean of scores in [0, 1].

    Such scores vary at most as much as a share of the same mean. Source: Wilson (1927).
    """
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    spread = share * (1 - share) / count + Z * Z / (4 * count * count)
    half = Z / (1 + Z * Z / count) * math.sqrt(spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def difference(before: Estimate, after: Estimate) -> tuple[float, float] | None:
    """Return the 95 % interval of after - before, from theirs (Newcombe's); None without them."""
    if None in (before.low, before.high, after.low, after.high):
        return None
    change = after.value - before.value
    down = math.hypot(after.value - after.low, before.high - before.value)
    up = math.hypot(after.high - after.value, before.value - before.low)
    return change - down, change + up


def headline_of(run: Run, health: Sequence[Health]) -> Headline:
    """Judge a run by its main metric and its checks."""
    change = _change(run)
    verdict, sentence = _judge(change, is_finished=run.is_finished)
    warnings = [h.name for h in health if h.holds and h.status == "warning"]
    reasons = [f"Warnings that hold at the end: {', '.join(warnings)}."] if warnings else []
    if change and not change.of.endswith("held out"):
        reasons.append("Nothing was measured on held-out data (--eval_steps, --eval_dataset).")
    return Headline(
        task=task_of(run),
        state=_state(run),
        duration=duration(run.seconds),
        of=change.of if change else "",
        before=change.before if change else None,
        after=change.after if change else None,
        change=_written(change) if change else None,
        is_share=bool(change and change.is_share),
        verdict=verdict,
        sentence=sentence,
        reasons=reasons,
    )


def task_of(run: Run) -> str:
    """Name what was trained on what: `RLTrainer, from runs/base/model, on data/problems.jsonl`."""
    trainer = str(run.environment.get("trainer", "")).removesuffix("Trainer")
    parts = [f"{trainer} training" if trainer else "Training"]
    for word, name in (("from", "model_name_or_path"), ("on", "dataset")):
        if run.config.get(name):
            parts.append(f"{word} {run.config[name]}")
    return " ".join(parts)


def duration(seconds: float) -> str:
    """Write seconds as `42 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _state(run: Run) -> str:
    planned = run.config.get("max_steps") or -1
    steps = f"{run.last_step:,}" + (f" of {planned:,}" if planned > 0 else "") + " steps"
    return f"finished, {steps}" if run.is_finished else f"not finished, {steps}"


def _goals(run: Run) -> list[Goal]:
    main = [Goal(name, name, 1) for name in run.parts[:1]]
    return [
        *main,
        Goal("reward", "reward", 1) if run.parts else Goal("pair_accuracy", "pair accuracy", 1),
        *([] if run.parts else [TOKEN_ACCURACY]),
        Goal("loss", "loss", -1),
    ]


def _change(run: Run) -> _Change | None:
    goals = _goals(run)
    for goal in goals:
        found = series_of(run.evaluations, f"eval_{goal.name}", goal.words)
        if len(found.values) > 1:
            return _held_out(run, goal, found)
    for goal in (goal for goal in goals if goal is not TOKEN_ACCURACY):
        found = series_of(run.lines, goal.name, goal.words)
        if len(found.values) > 1:
            return _in_training(goal, found)
    return None


def _held_out(run: Run, goal: Goal, found: Series) -> _Change:
    count = run.environment.get("rows", {}).get("held_out", 0)
    ends = found.values[0], found.values[-1]
    is_share = goal.sign > 0 and all(0 <= value <= 1 for value in found.values)

    def estimate(value: float) -> Estimate:
        return Estimate(value, *wilson(value, count)) if is_share and count else Estimate(value)

    where = f"{count:,} rows, held out" if count else "held out"
    before, after = map(estimate, ends)
    return _Change(goal, f"{goal.words} on {where}", before, after, is_share)


def _in_training(goal: Goal, found: Series) -> _Change:
    size = max(FEWEST_LINES, round(SHARE_OF_LINES * len(found.values)))
    size = min(size, len(found.values) // 2)
    is_share = goal.sign > 0 and all(0 <= value <= 1 for value in found.values)
    ends, deviation = (found.values[:size], found.values[-size:]), noise(found.values)
    before, after = (_mean(end, deviation, is_share=is_share) for end in ends)
    lines = "log line" if size == 1 else f"{size} log lines"
    return _Change(
        goal, f"{goal.words} in training, first and last {lines}", before, after, is_share
    )


def noise(values: Sequence[float]) -> float:
    """Return the standard deviation of a series around its course, from neighbours' differences.

    By hand: 0, 1, 0, 1 has squared differences of mean 1, so sqrt(1 / 2). (von Neumann, 1941)
    """
    steps = [(after - before) ** 2 for before, after in pairwise(values)]
    return math.sqrt(math.fsum(steps) / (2 * len(steps))) if steps else 0.0


def _mean(values: Sequence[float], deviation: float, *, is_share: bool) -> Estimate:
    mean = math.fsum(values) / len(values)
    if len(values) < FEWEST_LINES:
        return Estimate(mean)
    half = Z * deviation / math.sqrt(len(values))
    low, high = mean - half, mean + half
    return Estimate(mean, max(0.0, low), min(1.0, high)) if is_share else Estimate(mean, low, high)


def _written(change: _Change) -> tuple[str, str] | None:
    """Write the difference and its interval: `+60 points`, `+55.1 to +64.3`."""
    bounds = difference(change.before, change.after)
    if bounds is None:
        return None
    values = (change.after.value - change.before.value, *bounds)
    step, low, high = (
        f"{value * 100:+.3g}" if change.is_share else f"{value:+.3g}" for value in values
    )
    return step + " points" * change.is_share, f"{low} to {high}"


def _judge(change: _Change | None, *, is_finished: bool) -> tuple[Verdict, str]:
    if change is None:
        return "unclear", "Too little has been logged to say whether it worked."
    goal, _, before, after, is_share = change
    words = goal.words[0].upper() + goal.words[1:]
    course = f"from {short(before.value, is_share=is_share)} to "
    course += short(after.value, is_share=is_share)
    bounds, step = difference(before, after), after.value - before.value
    if bounds is None:
        verdict = "better" if step * goal.sign > 0 else "worse" if step else "unclear"
        doubt = ", by numbers too few for an interval" if step else ""
    else:
        verdict, doubt = "unclear", ", which may be chance"
        if min(bounds) > 0 or max(bounds) < 0:
            verdict, doubt = ("better" if step * goal.sign > 0 else "worse"), ""
    verb = "rose" if step > 0 else "fell" if step < 0 else "stayed"
    answers = {"better": "It worked", "worse": "It got worse", "unclear": "No clear change"}
    answer = answers[verdict] if is_finished else {**answers, "better": "It works so far"}[verdict]
    return verdict, f"{answer}: {words} {verb} {course}{doubt}."
