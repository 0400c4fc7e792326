"""From a report to one HTML page, whole in itself: no request, and no text of a model as markup.

    write_report("runs/r1_zero")        # -> runs/r1_zero/report.html
    write_comparison(["runs/a", "runs/b"], "compare.html")

Templates escape all that they print. What scripts read stands in one JSON block, in which no
character can end the block. A content security policy forbids the page every request and any
script or style but its own two, which it knows by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from posttrain.report import charts
from posttrain.report.block import safe_json
from posttrain.report.build import build_report
from posttrain.report.compare import compare
from posttrain.report.model import Chart
from posttrain.report.run import read_run
from posttrain.run.folder import write_whole

TEMPLATES = Path(__file__).parent / "templates"
DIGITS = 5  # of a value that the pointer shows


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run, by default to report.html in its folder; return where it is.

    Raises:
        ConfigError: see posttrain.report.run.read_run.
        DataError: see there.
    """
    run = read_run(folder)
    path = Path(output) if output else run.folder / "report.html"
    report = build_report(run)
    every = [*report.charts, *(report.hacking.charts if report.hacking else ())]
    data = {**data_of(every, run.last_step), **report.samples}
    data["disagreeing"] = report.hacking.disagreeing if report.hacking else []
    write_whole(path, render("report.html.j2", data, report=report, last_step=run.last_step))
    return path


def write_comparison(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write a comparison of two runs or more; return where it is.

    Raises:
        ConfigError: Fewer than two runs, or no run folder.
    """
    comparison = compare(list(map(read_run, folders)))
    data = data_of(comparison.charts, comparison.last_step)
    text = render("compare.html.j2", data, comparison=comparison, last_step=comparison.last_step)
    write_whole(output, text)
    return Path(output)


def render(template: str, data: dict[str, Any], **values: object) -> str:
    """Render a template with its style, script and data inside."""
    environment = Environment(
        loader=PackageLoader("posttrain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = charts.short
    environment.globals |= {"box": charts, "draw": charts.draw}
    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("report.css", "report.js"))
    text = environment.get_template(template).render(
        style=Markup(style),
        script=Markup(script),
        policy=policy_of(style, script),
        data=Markup(safe_json(data)),
        **values,
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # without halves of surrogate pairs


def policy_of(style: str, script: str) -> str:
    """Return the content security policy of a page with this style and script."""
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    ]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def data_of(drawn: Sequence[Chart], last_step: int) -> dict[str, Any]:
    """Collect what the pointer shows: for each chart its series, thinned as they are drawn."""
    found, steps = {}, []
    for chart in drawn:
        series = [charts.thinned(one) for one in chart.series]
        steps += [one.steps for one in series if one.steps not in steps]
        found[chart.key] = {
            "x": charts.draw(chart, last_step=last_step).x_range,
            "share": chart.is_share,
            "series": [
                {
                    "label": s.label,
                    "s": steps.index(s.steps),
                    "v": [float(f"{v:.{DIGITS}g}") for v in s.values],
                }
                for s in series
            ],
        }
    return {"charts": found, "steps": steps, "left": charts.LEFT, "right": charts.RIGHT}
