"""The report of the real run: tables with intervals, and the curves of both sides on one plot."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

NAMES = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}
CURVES = {"sft": "loss", "dpo": "loss", "grpo": "reward"}
DOCUMENT, PICTURE, MARK = Path("docs/real_run.md"), Path("docs/real_run.svg"), "<!-- real_run -->"
WIDTH, HEIGHT, GAP = 250, 150, 44  # of a panel, in pixels
STYLE = (
    "text{font:11px sans-serif;fill:#555}.b{fill:none;stroke:#ccc}"
    ".ours{fill:none;stroke:#2a6;stroke-width:2.5}"
    ".peer{fill:none;stroke:#c42;stroke-width:1.2;stroke-dasharray:4 3}"
)


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write report.md and curves.svg into the folder, and print the former."""
    text = f"{costs(results)}\n\n{accuracies(results)}\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "curves.svg").write_text(picture(results), encoding="utf-8")
    print(text)


def write_docs(folder: Path) -> None:
    """Put the report of a folder into docs/real_run.md, between its marks, and its plot beside."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(MARK)
    after = rest.partition(MARK)[2]
    text = (folder / "report.md").read_text(encoding="utf-8")
    DOCUMENT.write_text(f"{before}{MARK}\n\n{text}\n{MARK}{after}", encoding="utf-8")
    PICTURE.write_text((folder / "curves.svg").read_text(encoding="utf-8"), encoding="utf-8")


def curve(results: dict[str, Any], stage: str, side: str) -> list[float]:
    """Return what the stage's plot shows, one number for each optimizer step."""
    name = CURVES[stage]
    return [entry[name] for entry in results[f"{stage}-{side}"]["log"] if name in entry]


def costs(results: dict[str, Any]) -> str:
    """Tabulate CPU seconds, memory and the distance of the curves by stage."""
    lines = [
        "| stage | ours, CPU s | TRL, CPU s | ours / TRL | peak GB: ours, TRL | "
        "curves: first → last of ours, of TRL | furthest apart | TRL's best setting |",
        "|---|---|---|---|---|---|---|---|",
    ]
    totals = [0.0, 0.0]
    for stage, name in NAMES.items():
        ours, peer = (results[f"{stage}-{side}"] for side in ("ours", "peer"))
        totals = [totals[0] + ours["cpu_seconds"], totals[1] + peer["cpu_seconds"]]
        drawn = [curve(results, stage, side) for side in ("ours", "peer")]
        ends = ", ".join(f"{line[0]:.3f} → {line[-1]:.3f}" for line in drawn)
        apart = max(abs(a - b) for a, b in zip(*drawn, strict=True))
        lines.append(
            f"| {name}, {len(drawn[0])} steps | {ours['cpu_seconds']:.0f} | "
            f"{peer['cpu_seconds']:.0f} | {ours['cpu_seconds'] / peer['cpu_seconds']:.2f} | "
            f"{ours['peak_gb']:.2f}, {peer['peak_gb']:.2f} | {CURVES[stage]} {ends} | "
            f"{apart:.1g} | {peer['setting']} |"
        )
    lines.append(
        f"| whole | {totals[0]:.0f} | {totals[1]:.0f} | **{totals[0] / totals[1]:.2f}** | | | | |"
    )
    return "\n".join(lines)


def accuracies(results: dict[str, Any]) -> str:
    """Tabulate held-out accuracies of every model, with 95 % intervals."""
    lines = [
        "| model | GSM8K, held out | chosen is likelier | more so than after SFT |",
        "|---|---|---|---|",
        _row("before", results["base"], None),
    ]
    for stage, name in NAMES.items():
        for side, label in (("ours", "posttrain"), ("peer", "TRL")):
            reference = results[f"sft-{side}-score"]["pairs"] if stage != "sft" else None
            found = results[f"{stage}-{side}-score"]
            lines.append(_row(f"after {name}, {label}", found, reference))
    return "\n".join(lines)


def _row(label: str, found: dict[str, Any], reference: Sequence[Sequence[float]] | None) -> str:
    pairs = found["pairs"]
    likelier = share([chosen > rejected for chosen, rejected in pairs])
    preferred = (
        ""
        if reference is None
        else share([c - rc > r - rr for (c, r), (rc, rr) in zip(pairs, reference, strict=True)])
    )
    return f"| {label} | {share(found['right'])} | {likelier} | {preferred} |"


def share(hits: Sequence[bool]) -> str:
    """The share of hits in percent, with Wilson's 95 % interval; empty for none."""
    if not hits:
        return ""
    n, p, z = len(hits), sum(hits) / len(hits), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:.1f} % ({100 * max(0.0, low):.1f} to {100 * high:.1f})"


def picture(results: dict[str, Any]) -> str:
    """Draw a panel for each stage, with both sides' curves."""
    panels = [_panel(results, stage, place) for place, stage in enumerate(NAMES)]
    width = len(panels) * (WIDTH + GAP) + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 2 * GAP}" '
        f'width="{width}"><style>{STYLE}</style>\n' + "\n".join(panels) + "\n</svg>\n"
    )


def _panel(results: dict[str, Any], stage: str, place: int) -> str:
    drawn = {side: curve(results, stage, side) for side in ("ours", "peer")}
    numbers = [y for line in drawn.values() for y in line]
    low, high = min(numbers), max(numbers)
    steps, span = max(1, len(drawn["ours"]) - 1), (high - low) or 1.0
    lines = "".join(
        f'<polyline class="{side}" points="'
        + " ".join(
            f"{WIDTH * x / steps:.1f},{HEIGHT * (high - y) / span:.1f}" for x, y in enumerate(line)
        )
        + '"/>'
        for side, line in drawn.items()
    )
    title = escape(f"{NAMES[stage]}: {CURVES[stage]} by step")
    return (
        f'<g transform="translate({GAP + place * (WIDTH + GAP)} {GAP})"><text y="-22">{title}'
        f'</text><text y="-8">posttrain (line), TRL (dashes)</text>'
        f'<rect class="b" width="{WIDTH}" height="{HEIGHT}"/>'
        f'<text x="-4" y="8" text-anchor="end">{high:.2f}</text>'
        f'<text x="-4" y="{HEIGHT}" text-anchor="end">{low:.2f}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{steps + 1}</text>{lines}</g>'
    )
