"""The types of a report, which the templates read and tests can hold by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["better", "worse", "unclear"]


@dataclass(frozen=True)
class Series:
    """A metric over the steps at which it was logged.

    `is_dots`: few points, of evaluations, which are drawn as dots on a line and not smoothed.
    """

    name: str
    label: str
    steps: list[int]
    values: list[float]
    is_dots: bool = False


@dataclass(frozen=True)
class Chart:
    """One picture: metrics that share an axis, and a line on what they mean.

    Attributes:
        key: Its name within the page, of letters, digits and `_`.
        is_share: The values are shares, so the axis runs from 0 to 1 and numbers are in percent.
    """

    key: str
    title: str
    meaning: str
    series: list[Series]
    section: str
    is_share: bool = False


@dataclass(frozen=True)
class Estimate:
    """A measured value; `low` and `high` bound it at 95 %, where that can be said."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Headline:
    """The answer to "did it work".

    Attributes:
        of: The metric in words, and what it was measured on.
        change: From before to after, and its interval at 95 %, where that can be said.
        reasons: Sentences that qualify the verdict.
    """

    task: str
    state: str
    duration: str
    of: str
    before: Estimate | None
    after: Estimate | None
    change: tuple[str, str] | None
    is_share: bool
    verdict: Verdict
    sentence: str
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Health:
    """The result of one check of the run.

    Attributes:
        status: "fine" if it never held.
        text: What was found, and what to do.
        when: On which steps it held.
        anchor: Its heading in docs/troubleshooting.md.
    """

    name: str
    status: Literal["warning", "note", "fine"]
    text: str
    when: str
    anchor: str
    holds: bool = False


@dataclass(frozen=True)
class Drift:
    """A row of the reward-hacking panel: how a metric moved from the first lines to the last."""

    label: str
    before: str
    after: str
    meaning: str


@dataclass(frozen=True)
class Hacking:
    """The reward-hacking panel.

    Attributes:
        signs: Sentences, each a sign that the reward is gained by other means than the task.
        disagreeing: Places in `Report.samples` of those whose parts are furthest apart.
    """

    charts: list[Chart]
    drifts: list[Drift]
    signs: list[str]
    disagreeing: list[int]


@dataclass(frozen=True)
class Setting:
    """A setting of the run; `default` is its recipe's, where it was changed."""

    name: str
    value: str
    default: str | None


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        samples: Records for the browser, in plain JSON types (posttrain.report.samples).
        facts: Command, versions, machine, data and the like: name and value.
        troubleshooting: Where docs/troubleshooting.md is, seen from the report; None if unknown.
    """

    name: str
    headline: Headline
    health: list[Health]
    charts: list[Chart]
    samples: dict[str, Any]
    hacking: Hacking | None
    settings: list[Setting]
    facts: list[tuple[str, str]]
    troubleshooting: str | None

    @property
    def sections(self) -> list[tuple[str, list[Chart]]]:
        """The charts by section, in their order."""
        found: dict[str, list[Chart]] = {}
        for chart in self.charts:
            found.setdefault(chart.section, []).append(chart)
        return list(found.items())
