"""Plot a curve as an SVG picture, without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 48
INK = "#333"
COLORS = ("#2a6fbb", "#c0504d", "#4f9d4f", "#8064a2", "#d08a1d", "#2a9d9d", "#777")


def line_plot(points: Sequence[tuple[float, float]], *, across: str, up: str) -> str:
    """Plot points joined by lines; both axes begin at 0, so that a proportion looks like one.

    Args:
        across: Label of the horizontal axis.
        up: Label of the vertical axis.
    """
    return lines_plot({"": points}, across=across, up=up)


def lines_plot(curves: Mapping[str, Sequence[tuple[float, float]]], *, across: str, up: str) -> str:
    """Plot several curves over the same places, each with its name at its end."""
    every = [point for points in curves.values() for point in points]
    most_x, most_y = (_round_up(max(p[i] for p in every)) for i in (0, 1))
    right = RIGHT + 7 * max(map(len, curves))

    def place(x: float, y: float) -> tuple[float, float]:
        inner_width, inner_height = WIDTH - LEFT - right, HEIGHT - TOP - BOTTOM
        return LEFT + inner_width * x / most_x, HEIGHT - BOTTOM - inner_height * y / most_y

    drawn, last = [], HEIGHT + 12.0
    for (name, points), color in zip(sorted(curves.items(), key=_height), COLORS, strict=False):
        placed = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in placed]
        x, last = placed[-1][0] + 8, min(placed[-1][1] + 4, last - 13)  # names do not overlap
        drawn.append(f'<text x="{x:.1f}" y="{last:.1f}" fill="{color}">{escape(name)}</text>')
    ticks = [_tick(place(x, 0), f"{x:g}", below=True) for x in sorted({x for x, _ in every})]
    levels = [most_y * i / 4 for i in range(5)]
    ticks += [_tick(place(0, y), f"{y:.4g}", below=False) for y in levels]
    (x0, y0), (x1, _), (_, y1) = place(0, 0), place(most_x, 0), place(0, most_y)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<path d="M{x0} {y1} V{y0} H{x1}" fill="none" stroke="{INK}"/>',
            *ticks,
            *drawn,
            f'<text x="{LEFT}" y="20" fill="{INK}">{escape(up)}</text>',
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end" fill="{INK}">'
            f"{escape(across)}</text>",
            "</svg>\n",
        ]
    )


def _height(curve: tuple[str, Sequence[tuple[float, float]]]) -> float:
    return curve[1][-1][1]


def _tick(at: tuple[float, float], label: str, *, below: bool) -> str:
    x, y = (at[0], at[1] + 16) if below else (at[0] - 6, at[1] + 4)
    anchor = "middle" if below else "end"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}">{label}</text>'


def _round_up(value: float) -> float:
    """Round up to the next of 1, 1.5, 2, 3, 4, 5, 6, 8, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value)
