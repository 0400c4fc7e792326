"""From a run to its report: all parts, in the order in which the page shows them.

report = build_report(read_run("runs/r1_zero"))
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.report.checks import checks_of
from posttrain.report.hacking import hacking_of
from posttrain.report.metrics import charts_of
from posttrain.report.model import Report, Setting
from posttrain.report.run import Run
from posttrain.report.samples import pack_samples
from posttrain.report.verdict import headline_of

TROUBLESHOOTING = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


def build_report(run: Run) -> Report:
    """Make the report of a run."""
    health, samples = checks_of(run), pack_samples(run)
    return Report(
        name=run.name,
        headline=headline_of(run, health),
        health=health,
        charts=charts_of(run),
        samples=samples,
        hacking=hacking_of(run, samples["samples"]),
        settings=settings_of(run),
        facts=facts_of(run),
        troubleshooting=link_to(TROUBLESHOOTING, run.folder),
    )


def link_to(document: Path, folder: Path) -> str | None:
    """Return the way from a run folder to a document of the checkout; None in a wheel."""
    if not document.is_file():
        return None
    return os.path.relpath(document, folder.resolve()).replace(os.sep, "/")


def settings_of(run: Run) -> list[Setting]:
    """List the settings, those that were changed first."""
    defaults = run.environment.get("defaults") or {}
    settings = [
        Setting(name, written(value), written(defaults[name]) if name in defaults else None)
        for name, value in run.config.items()
    ]
    return sorted(settings, key=lambda setting: setting.default is None)


def facts_of(run: Run) -> list[tuple[str, str]]:
    """List what a result hangs on besides the settings."""
    environment = run.environment
    facts = [
        ("run folder", str(run.folder.resolve())),
        ("command", str(environment.get("command", ""))),
        ("started", str(environment.get("time", ""))),
        ("resumed", ", ".join(str(again.get("time")) for again in environment.get("resumed", ()))),
        ("commit", str(environment.get("git") or "")),
        ("Python", str(environment.get("python", ""))),
        ("packages", _pairs(environment.get("packages") or {})),
        ("platform", str(environment.get("platform", ""))),
        ("processor", f"{environment.get('cpu', '')}, {environment.get('cpu_cores', '?')} cores"),
        ("GPUs", ", ".join(environment.get("gpus") or ()) or "none"),
        ("processes", str(environment.get("world_size", ""))),
        ("seed", str(run.config.get("seed", ""))),
        ("rows", _pairs(environment.get("rows") or {})),
        ("rewards and weights", _pairs(environment.get("rewards") or {})),
    ]
    for name, described in (environment.get("reward_facts") or {}).items():
        facts.append((f"reward {name}", _pairs(described)))
    for name, entry in (environment.get("inputs") or {}).items():
        facts.append((name, f"{entry.get('path')}, SHA-256 {entry.get('sha256')}"))
    return [(name, value) for name, value in facts if value]


def written(value: object) -> str:
    """Write a setting as YAML would: none, true, 0.0001, text."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
