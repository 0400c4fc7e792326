"""Plot a curve as an SVG picture, without a plotting library."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 48
INK, CURVE = "#333", "#2a6fbb"


def line_plot(points: Sequence[tuple[float, float]], *, across: str, up: str) -> str:
    """Plot points joined by lines; both axes begin at 0, so that a proportion looks like one.

    Args:
        across: Label of the horizontal axis.
        up: Label of the vertical axis.
    """
    most_x, most_y = (_round_up(max(p[i] for p in points)) for i in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + inner_width * x / most_x, HEIGHT - BOTTOM - inner_height * y / most_y

    placed = [place(*point) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{CURVE}"/>' for x, y in placed]
    ticks = [_tick(place(x, 0), f"{x:g}", below=True) for x, _ in points]
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
            f'<polyline points="{path}" fill="none" stroke="{CURVE}" stroke-width="2"/>',
            *dots,
            f'<text x="{LEFT}" y="20" fill="{INK}">{escape(up)}</text>',
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end" fill="{INK}">'
            f"{escape(across)}</text>",
            "</svg>\n",
        ]
    )


def _tick(at: tuple[float, float], label: str, *, below: bool) -> str:
    x, y = (at[0], at[1] + 16) if below else (at[0] - 6, at[1] + 4)
    anchor = "middle" if below else "end"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}">{label}</text>'


def _round_up(value: float) -> float:
    """Round up to the next of 1, 1.5, 2, 3, 4, 5, 6, 8, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value)
