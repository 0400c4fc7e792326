"""Report measured runs: medians, ratios, a table, and a check that both sides did the same work.

A run is a dict: cpu_seconds, wall_seconds, peak_gb, first (metrics of the first step).
"""

from collections.abc import Mapping, Sequence
from statistics import median

from posttrain.errors import PosttrainError

QUANTITIES = ("cpu_seconds", "wall_seconds", "peak_gb")
UNITS = {"cpu_seconds": "CPU s", "wall_seconds": "s"}
OURS = "ours"
# Relative difference of what both sides say of their first step, from the same weights and data.
# In float32 they are found to agree to 1e-6; in bfloat16, which has 8 significant bits and to which
# the two sides round in different places, to 1e-4, and in the gradient's norm to 2e-3.
TOLERANCES = {
    "float32": {"grad_norm": 0.001, "default": 0.0001},
    "bfloat16": {"grad_norm": 0.02, "default": 0.001},
}


class DisagreementError(PosttrainError):
    """The two sides computed different things; no speed is reported."""


def medians(runs: Sequence[Mapping]) -> dict[str, float]:
    """Median of each quantity over the runs."""
    return {name: median(run[name] for run in runs) for name in QUANTITIES}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Divide theirs by ours: the medians, and the lowest and highest ratio of the rounds."""
    rounds = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": median(theirs) / median(ours), "low": min(rounds), "high": max(rounds)}


def summarise(runs: Mapping[str, Sequence[Mapping]]) -> dict:
    """Return the medians of every side, and the ratios to ours of every other side."""
    ratios = {
        side: {
            name: ratio([run[name] for run in runs[OURS]], [run[name] for run in found])
            for name in QUANTITIES
        }
        for side, found in runs.items()
        if side != OURS
    }
    return {"medians": {side: medians(found) for side, found in runs.items()}, "ratios": ratios}


def check_agreement(runs: Mapping[str, Sequence[Mapping]], *, dtype: str) -> dict[str, float]:
    """Return the largest relative difference to our first run of each metric of the first step.

    Raises:
        DisagreementError: A difference is above the tolerance of `dtype`.
    """
    ours = runs[OURS][0]["first"]
    worst = dict.fromkeys(ours, 0.0)
    for side, found in runs.items():
        for name, run in ((name, run) for name in ours for run in found):
            theirs = run["first"][name]
            gap = abs(theirs - ours[name]) / max(abs(ours[name]), 1e-6)
            worst[name] = max(worst[name], gap)
            allowed = TOLERANCES[dtype].get(name, TOLERANCES[dtype]["default"])
            if not gap <= allowed:
                raise DisagreementError(
                    f"first step, {name}: {side} says {theirs:.6g}, ours {ours[name]:.6g}; "
                    f"expected a relative difference of at most {allowed} in {dtype}. "
                    "The two sides do different work: nothing is reported."
                )
    return worst


def table(report: Mapping) -> str:
    """Format the figures of a report (harness.run) for a terminal, and for RESULTS.md."""
    clock = report["clock"]
    head = ("", "CPU s", "wall s", "peak GB", f"tokens/{UNITS[clock]}", "share of product rate")
    rows = [head]
    for side, found in report["summary"]["medians"].items():
        rows.append(
            (
                report["sides"][side],
                f"{found['cpu_seconds']:.2f}",
                f"{found['wall_seconds']:.2f}",
                f"{found['peak_gb']:.2f}",
                f"{report['work']['tokens'] / found[clock]:,.0f}",
                f"{report['shares'][side]:.0%}",
            )
        )
    for side, found in report["summary"]["ratios"].items():
        cells = [spread(found[name]) for name in QUANTITIES]
        rows.append((f"{report['sides'][side]} / ours", *cells, "", ""))
    return markdown(rows)


def section(report: Mapping) -> str:
    """Format a report as a section of RESULTS.md."""
    machine, config, rates = report["machine"], report["config"], report["product_gflops"]
    gaps = ", ".join(f"{name} {gap:.1e}" for name, gap in report["agreement"].items())
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "trl"))
    return (
        f"### {report['benchmark']}, {config['size']}, {report['dtype']}, "
        f"{config['threads']} thread(s)\n\n"
        f"`{report['command']}`: {report['what']}.\n\n"
        f"{table(report)}\n\n"
        f"{machine['processor']}, {machine['cores']} cores; {versions}. Matrix products: float32 "
        f"{rates['float32']:.1f}, bfloat16 {rates['bfloat16']:.1f} GFLOP a second of "
        f"{UNITS[report['clock']]}. {config['rounds']} rounds of {config['steps']} steps. "
        f"First steps differ by: {gaps}.\n"
    )


def spread(found: Mapping[str, float]) -> str:
    """Format a ratio with its lowest and highest value."""
    return f"{found['ratio']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format aligned rows as a Markdown table; the first is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
