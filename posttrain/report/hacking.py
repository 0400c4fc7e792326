"""Is the reward gained by other means than the task: the reward-hacking panel.

    hacking = hacking_of(run, packed["samples"])
    hacking.signs       # ["reward rose by 0.31 and held-out accuracy did not (0.02): …"]

Rewards are stand-ins. What a policy learns to gain from them without the task shows in rewards
that rise while held-out accuracy does not, in answers that grow or repeat themselves, in the share
of the reward that comes from the form alone, and in samples whose parts disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.report.charts import short
from posttrain.report.metrics import series_of
from posttrain.report.model import Chart, Drift, Hacking, Series
from posttrain.report.run import Run

EDGE = 0.1  # share of the log lines that are "first" and "last"
RISEN, FLAT = 0.05, 0.02  # changes of a mean: clear of its noise, and within it
FORM_SHARE = 0.5  # of the reward that parts other than the main one bring, at the end
LONGER, LOOPS = 1.5, 0.1  # times the first length; rise of the repeated share
DISAGREEING = 8  # samples
DRIFTS = {
    "mean_completion_tokens": ("completion length, tokens", "longer is paid, or thought helps"),
    "repetition": ("repeated runs of four tokens", "a policy that loops"),
    "truncated": ("truncated completions", "answers that never come"),
    "entropy": ("entropy, nats", "near 0: one way to please, repeated"),
}


def hacking_of(run: Run, samples: Sequence[dict[str, Any]]) -> Hacking | None:
    """Make the panel; None for a run without rewards."""
    if not run.parts or not run.lines:
        return None
    main = run.parts[0]
    series = [
        series_of(run.lines, "reward", "reward in training"),
        series_of(run.lines, main, f"{main} in training"),
        series_of(run.evaluations, f"eval_{main}", f"{main} held out", is_dots=True),
    ]
    form = form_series(run)
    charts = [
        Chart(
            "hacking_reward",
            "Rewards against the held-out result",
            "They should rise together. A reward that rises alone is gained by other means.",
            [s for s in series if s.steps],
            "",
        )
    ]
    if form.steps:
        charts.append(
            Chart(
                "hacking_form",
                "Share of the reward from other parts than the main one",
                f"What all parts but {main} bring, of the whole. It should fall as {main} is "
                "learnt; near 100 % the form is all that is learnt.",
                [form],
                "",
                True,
            )
        )
    return Hacking(charts, _drifts(run), _signs(run, form), disagreeing(samples))


def form_series(run: Run) -> Series:
    """The share of the mean reward, by weights, that parts other than the main one bring."""
    weights = run.environment.get("rewards") or {}
    steps, values = [], []
    for line in run.lines:
        terms = [abs(weights.get(part, 0.0)) * (line.get(part) or 0.0) for part in run.parts]
        if len(terms) > 1 and min(terms) >= 0 and sum(terms) > 0:
            steps.append(line["step"])
            values.append(sum(terms[1:]) / sum(terms))
    return Series("form_share", "share of other parts", steps, values)


def disagreeing(samples: Sequence[dict[str, Any]]) -> list[int]:
    """Return the places of the samples whose parts are furthest apart, the newest first of equals.

    Each part is read on its range of values with 0, so that a part that is 1 in all samples agrees
    with another that is at its best. A part that is always 0 tells nothing.
    """
    rows = [sample["v"] for sample in samples]
    if not rows or len(rows[0]) < 2:
        return []
    spans = []
    for column in zip(*rows, strict=True):
        known = [value for value in column if value is not None]
        low, high = min([0.0, *known]), max([0.0, *known])
        spans.append((low, high - low))
    gaps = []
    for place, row in enumerate(rows):
        scaled = [
            (v - low) / size
            for v, (low, size) in zip(row, spans, strict=True)
            if size and v is not None
        ]
        gaps.append((max(scaled) - min(scaled) if len(scaled) > 1 else 0.0, place))
    gaps.sort(reverse=True)
    return [place for gap, place in gaps[:DISAGREEING] if gap > 0]


def ends(series: Series) -> tuple[float, float] | None:
    """Return the means of the first and last values; None where there are fewer than two."""
    size = max(1, round(EDGE * len(series.values)))
    if len(series.values) < 2:
        return None
    first, last = series.values[:size], series.values[-size:]
    return sum(first) / size, sum(last) / size


def _drifts(run: Run) -> list[Drift]:
    rows = {part: (part, "") for part in ("reward", *run.parts)}
    rows[run.parts[0]] = (run.parts[0], "what counts")
    drifts = []
    for name, (label, meaning) in {**rows, **DRIFTS}.items():
        if found := ends(series_of(run.lines, name, label)):
            drifts.append(Drift(label, short(found[0]), short(found[1]), meaning))
    held_out = series_of(run.evaluations, f"eval_{run.parts[0]}", "")
    if len(held_out.values) > 1:
        first, last = held_out.values[0], held_out.values[-1]
        drifts.insert(
            2, Drift(f"{run.parts[0]}, held out", short(first), short(last), "what counts")
        )
    return drifts


def _signs(run: Run, form: Series) -> list[str]:
    main = run.parts[0]
    held_out = series_of(run.evaluations, f"eval_{main}", "")
    judge, words = (held_out, f"held-out {main}") if len(held_out.values) > 1 else (None, main)
    reward = _change(series_of(run.lines, "reward", ""))
    result = (
        judge.values[-1] - judge.values[0] if judge else _change(series_of(run.lines, main, ""))
    )
    signs = []
    if reward > RISEN and result < FLAT:
        signs.append(
            f"The reward rose by {reward:.2f}, and {words} did not ({result:+.2f}): it is gained "
            "by other means. Read the samples whose parts disagree"
        )
    if judge and _change(series_of(run.lines, main, "")) > RISEN and result < FLAT:
        signs.append(
            f"{main} rose in training and not held out: the problems are learnt by heart, or the "
            "held-out ones are of another kind"
        )
    if form.values and (end := ends(form) or (0.0, 0.0))[1] > FORM_SHARE:
        signs.append(f"At the end {end[1]:.0%} of the reward comes from other parts than {main}")
    length = ends(series_of(run.lines, "mean_completion_tokens", ""))
    if length and length[1] > LONGER * max(length[0], 1) and result < FLAT:
        signs.append(
            f"Completions grew from {length[0]:.0f} to {length[1]:.0f} tokens without a better "
            "result: length itself may be paid"
        )
    if _change(series_of(run.lines, "repetition", "")) > LOOPS:
        signs.append("Completions repeat themselves more than at the start: a penalty may be cheap")
    return signs


def _change(series: Series) -> float:
    found = ends(series)
    return found[1] - found[0] if found else 0.0
