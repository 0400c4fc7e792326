"""Draw accuracy over steps as small panels in one SVG: `curves(before, {"grpo": [run, …], …})`.

A line is the mean over seeds of the accuracy in training (temperature 1); the dots are the start
and the saved model on held-out problems (temperature 0.6). Where training logs no accuracy, as
in PPO against a reward model, the line joins the dots.
"""

from collections.abc import Mapping, Sequence

COLUMNS, WIDTH, HEIGHT, GAP, TITLE = 5, 130, 70, 14, 14  # pixels, but for the first
STYLE = (
    "text{font:10px sans-serif;fill:#555}"
    ".b{fill:none;stroke:#ccc}.l{fill:none;stroke:#2a6;stroke-width:1.5}.d{fill:#c42}"
)


def curves(before: float, results: Mapping[str, Sequence[dict]]) -> str:
    """Draw a panel for each algorithm."""
    panels = [
        _panel(before, name, runs, *divmod(place, COLUMNS)[::-1])
        for place, (name, runs) in enumerate(results.items())
    ]
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * (WIDTH + GAP) + GAP, rows * (HEIGHT + TITLE + GAP) + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
        f"<style>{STYLE}</style>\n" + "\n".join(panels) + "\n</svg>\n"
    )


def _panel(before: float, name: str, runs: Sequence[dict], column: int, row: int) -> str:
    left, top = GAP + column * (WIDTH + GAP), GAP + row * (HEIGHT + TITLE + GAP)
    steps = runs[0]["steps"]
    after = sum(run["accuracy"] for run in runs) / len(runs)
    ends = [(0, before), (steps, after)]

    def place(step: float, share: float) -> str:
        return f"{WIDTH * step / steps:.0f},{HEIGHT * (1 - share):.1f}"

    line = " ".join(place(*point) for point in mean_curve(runs) or ends)
    dots = "".join(
        '<circle class="d" r="2.5" cx="{}" cy="{}"/>'.format(*place(*end).split(","))
        for end in ends
    )
    return (
        f'<g transform="translate({left} {top + TITLE})"><text y="-4">{name} {100 * after:.0f} %'
        f'</text><rect class="b" width="{WIDTH}" height="{HEIGHT}"/>'
        f'<polyline class="l" points="{line}"/>{dots}</g>'
    )


def mean_curve(runs: Sequence[dict]) -> list[tuple[float, float]]:
    """Return (step, mean accuracy over the runs) at the steps where all of them have one."""
    by_step = [dict(map(tuple, run["curve"])) for run in runs]
    shared = sorted(set.intersection(*(set(points) for points in by_step)))
    return [(step, sum(points[step] for points in by_step) / len(runs)) for step in shared]
