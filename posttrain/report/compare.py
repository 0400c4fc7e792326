"""Runs side by side: their results, curves on the same axes, settings that differ, samples.

comparison = compare([read_run("runs/sft"), read_run("runs/dpo")])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.errors import ConfigError
from posttrain.report.build import written
from posttrain.report.checks import checks_of
from posttrain.report.metrics import charts_of, key_of
from posttrain.report.model import Chart, Headline
from posttrain.report.run import Run
from posttrain.report.samples import shortened, text_of
from posttrain.report.verdict import headline_of

MOST_PROMPTS = 40
MOST_CHARS = 1500
SIDES = ("chosen", "rejected")  # of a held-out pair: texts of the data, not of the model
ALWAYS_DIFFER = frozenset(("output_dir",))


@dataclass(frozen=True)
class Cell:
    """The newest completion of a run for a prompt; `reward` is with its parts, or empty."""

    step: int
    reward: str
    completion: str


@dataclass(frozen=True)
class Comparison:
    """All that a comparison shows; lists of values are in the order of `names`.

    Attributes:
        differences: Name of a setting or fact, and its value in each run; None where it has none.
        prompts: A prompt that several runs answered, and each run's newest sample of it.
    """

    names: list[str]
    headlines: list[Headline]
    charts: list[Chart]
    differences: list[tuple[str, list[str | None]]]
    prompts: list[tuple[str, list[Cell | None]]]
    last_step: int


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare two runs or more; ConfigError for fewer."""
    if len(runs) < 2:
        raise ConfigError(f"compare: expected two run folders or more, found {len(runs)}.")
    names = names_of(runs)
    return Comparison(
        names=names,
        headlines=[headline_of(run, checks_of(run)) for run in runs],
        charts=overlaid(runs, names),
        differences=differences_of(runs),
        prompts=_common_prompts(runs),
        last_step=max(run.last_step for run in runs),
    )


def names_of(runs: Sequence[Run]) -> list[str]:
    """Name runs by their folders, and by as many of the folders above as tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    names = []
    for mine in parts:
        depths = range(1, len(mine) + 1)
        alone = (d for d in depths if sum(other[-d:] == mine[-d:] for other in parts) == 1)
        names.append("/".join(mine[-next(alone, len(mine)) :]))
    numbers = enumerate(names, start=1)
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in numbers]


def overlaid(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """Make for each metric a chart with a line for each run that logged it."""
    found: dict[str, Chart] = {}
    for run, name in zip(runs, names, strict=True):
        for chart in charts_of(run):
            for series in chart.series:
                title = series.label if len(chart.series) > 1 else chart.title
                mine = replace(series, label=name)
                known = found.get(series.name)
                if known is None:
                    key = key_of(series.name)
                    found[series.name] = replace(chart, key=key, title=title, series=[mine])
                elif all(one.label != name for one in known.series):
                    found[series.name] = replace(known, series=[*known.series, mine])
    return list(found.values())


def differences_of(runs: Sequence[Run]) -> list[tuple[str, list[str | None]]]:
    """List settings, inputs and versions in which the runs differ."""
    rows = []
    for described in (
        [{n: v for n, v in run.config.items() if n not in ALWAYS_DIFFER} for run in runs],
        [_facts(run.environment) for run in runs],
    ):
        for name in dict.fromkeys(name for one in described for name in one):
            values = [written(one[name]) if name in one else None for one in described]
            if len(set(values)) > 1:
                rows.append((name, values))
    return rows


def _facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    inputs = environment.get("inputs") or {}
    return {
        **{f"{name}, SHA-256": entry.get("sha256") for name, entry in inputs.items()},
        **{f"rows, {name}": count for name, count in (environment.get("rows") or {}).items()},
        **{f"package {name}": v for name, v in (environment.get("packages") or {}).items()},
        "commit": environment.get("git"),
        "processes": environment.get("world_size"),
        "GPUs": ", ".join(environment.get("gpus") or ()) or None,
    }


def _common_prompts(runs: Sequence[Run]) -> list[tuple[str, list[Cell | None]]]:
    """The prompts that at least two runs have samples of, held-out ones first."""
    newest: list[dict[str, dict[str, Any]]] = []
    for run in runs:
        by_prompt: dict[str, dict[str, Any]] = {}
        completions = [r for r in run.samples if r.get("chosen") not in SIDES]
        for record in sorted(completions, key=lambda record: record.get("step", 0)):
            by_prompt[text_of(record.get("prompt"))] = record
        newest.append(by_prompt)
    every = dict.fromkeys(prompt for samples in newest for prompt in samples)
    common = [p for p in every if sum(p in samples for samples in newest) > 1]
    common.sort(key=lambda p: all(s[p].get("chosen") != "held out" for s in newest if p in s))
    return [
        (
            shortened(p, MOST_CHARS),
            [_cell(samples.get(p), run.parts) for samples, run in zip(newest, runs, strict=True)],
        )
        for p in common[:MOST_PROMPTS]
    ]


def _cell(record: Mapping[str, Any] | None, parts: Sequence[str]) -> Cell | None:
    if record is None:
        return None
    text = shortened(text_of(record.get("completion")), MOST_CHARS)
    names = ("reward", *parts) if parts else ()
    values = [(name, record.get(name)) for name in names]
    reward = ", ".join(f"{n} {'none' if v is None else format(v, '.3g')}" for n, v in values)
    return Cell(record.get("step", 0), reward, text)
