"""From numbers to a drawing: scales, ticks, smoothed curves and the `d` of SVG paths.

    drawing = draw(chart)
    drawing.curves[0].raw          # "M48 120.5L49.1 119…", a point for each logged step

Coordinates are pixels of a box of WIDTH by HEIGHT, the origin at the top left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from posttrain.report.model import Chart, Series

Scale = Callable[[float], float]
WIDTH, HEIGHT = 480, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 470, 12, 174
SMOOTHED_FROM = 12  # values: fewer are read one by one
NOISY_FROM = 0.1  # turns a value: fewer are no noise
SPAN_SHARE, SHORTEST_SPAN = 1 / 12, 5  # of the values that the smoothing remembers
MOST_POINTS = 1000  # of a line; more than pixels there are show nothing more
SMOOTH_POINTS = 150  # of a smoothed one
TICKS = 4


@dataclass(frozen=True)
class Curve:
    """One series, drawn.

    Attributes:
        label: What it is.
        color: Its place among the colours of the page.
        raw: Path of the values as they were logged.
        smooth: Path of their moving mean; empty where there are few.
        points: The values' places, for dots.
        num_points: Number of values in `raw`.
    """

    label: str
    color: int
    raw: str
    smooth: str
    points: list[tuple[float, float]]
    num_points: int
    is_dots: bool


@dataclass(frozen=True)
class Drawing:
    """A chart, drawn: ticks are (place in pixels, text)."""

    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_range: tuple[float, float]


def draw(chart: Chart, *, last_step: int) -> Drawing:
    """Draw a chart whose axis of steps ends at `last_step`, so that all charts' steps align."""
    values = [value for series in chart.series for value in series.values]
    low, high = _range(values, is_share=chart.is_share)
    first = min((series.steps[0] for series in chart.series), default=0)
    x_range = (min(first, 1), max(last_step, first + 1))

    def x(step: float) -> float:
        return _place(step, x_range, (LEFT, RIGHT))

    def y(value: float) -> float:
        return _place(value, (low, high), (BOTTOM, TOP))

    curves = []
    for color, series in enumerate(map(thinned, chart.series)):
        points = [(x(s), y(v)) for s, v in zip(series.steps, series.values, strict=True)]
        smooth = "" if series.is_dots else _smooth_path(series, x, y)
        curves.append(
            Curve(series.label, color, path(points), smooth, points, len(points), series.is_dots)
        )
    texts = [(x(step), f"{step:,.0f}") for step in ticks(*x_range, whole=True)]
    return Drawing(curves, texts, _y_ticks(low, high, chart.is_share, y), x_range)


def thinned(series: Series) -> Series:
    """The series with at most MOST_POINTS values: means of neighbours, each at their last step."""
    size = math.ceil(len(series.steps) / MOST_POINTS)
    if size <= 1:
        return series
    starts = range(0, len(series.steps), size)
    parts = [series.values[start : start + size] for start in starts]
    steps = [series.steps[min(start + size, len(series.steps)) - 1] for start in starts]
    means = [math.fsum(part) / len(part) for part in parts]
    return Series(series.name, series.label, steps, means, series.is_dots)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return a moving mean over about a twelfth of the values, to both sides, so without a lag.

    A value n places away has the weight decay**n. By hand: few values have a span of 5 and so a
    decay of 1/2, and the first mean of a and b is (a + b / 2) / (3 / 2).
    """
    span = max(SHORTEST_SPAN, SPAN_SHARE * len(values))
    decay = (span - 1) / (span + 3)  # the mean is as steady as that of `span` equal weights
    before, after = _decayed(values, decay), _decayed(values[::-1], decay)[::-1]
    norm = _decayed([1.0] * len(values), decay)
    return [
        (a + b - value) / (m + n - 1)
        for a, b, value, m, n in zip(before, after, values, norm, norm[::-1], strict=True)
    ]


def _decayed(values: Sequence[float], decay: float) -> list[float]:
    """Return for each value its sum with those before it, which count less by their distance."""
    return list(accumulate(values, lambda total, value: decay * total + value))


def is_noisy(values: Sequence[float]) -> bool:
    """True where a course turns often; a schedule does not, and a mean would bend it."""
    changes = [after > before for before, after in pairwise(values) if after != before]
    turns = sum(before != after for before, after in pairwise(changes))
    return turns > NOISY_FROM * len(values)


def path(points: Sequence[tuple[float, float]]) -> str:
    """The `d` of a path through these points, to a tenth of a pixel."""
    return "".join(f"{'L' if i else 'M'}{x:.4g} {y:.4g}" for i, (x, y) in enumerate(points))


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Choose round numbers within [low, high], about TICKS of them."""
    step = 10 ** math.floor(math.log10((high - low) / TICKS))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= TICKS + 0.5)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float, *, is_share: bool = False) -> str:
    """Write a number for people: 24.8 %, 0.0312, 1,240, 2.5e-6."""
    if is_share:
        return f"{value * 100:.3g} %"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def _smooth_path(series: Series, x: Scale, y: Scale) -> str:
    if len(series.values) < SMOOTHED_FROM or not is_noisy(series.values):
        return ""
    points = list(zip(series.steps, smoothed(series.values), strict=True))
    skipped = math.ceil(len(points) / SMOOTH_POINTS)
    shown = points[::skipped][:-1] + points[-1:]
    return path([(x(step), y(value)) for step, value in shown])


def _range(values: Sequence[float], *, is_share: bool) -> tuple[float, float]:
    """The axis of values: a little more than all, or all of 0 to 1 for shares that fill it."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if is_share and high > 0.5:
        return min(0.0, low), max(1.0, high)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 0.1
    return (0.0 if is_share or 0 <= low <= 0.3 * high else low - room), high + room


def _y_ticks(low: float, high: float, is_share: bool, y: Scale) -> list[tuple[float, str]]:
    return [(y(value), short(value, is_share=is_share)) for value in ticks(low, high)]


def _place(value: float, of: tuple[float, float], to: tuple[float, float]) -> float:
    share = (value - of[0]) / (of[1] - of[0])
    return round(to[0] + share * (to[1] - to[0]), 1)
