"""`posttrain report` and `posttrain compare`: pages that show what runs did.

    posttrain report runs/r1_zero                          # writes runs/r1_zero/report.html
    posttrain compare runs/grpo runs/r1_zero --output compare.html

A run writes its report by itself when it ends; the command makes it anew, of a run that is going on
too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors, say


@dataclass(kw_only=True)
class ReportConfig:
    """Settings of a report."""

    run: str = option(help="run folder; also as the first argument")
    output: str | None = option(None, "file to write; none: report.html in the run folder")


@dataclass(kw_only=True)
class CompareConfig:
    """Settings of a comparison."""

    runs: list[str] = option([], "run folders, two or more; also as the first arguments")
    output: str = option("compare.html", "file to write")


def report_main(argv: Sequence[str]) -> None:
    """Write the report of the run that the first argument names."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    config = parse(ReportConfig, argv)
    with plain_errors():
        from posttrain.report.page import write_report

        say(f"report  {write_report(config.run, config.output)}")


def compare_main(argv: Sequence[str]) -> None:
    """Write a comparison of the runs that the first arguments name."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--runs", *argv]
    config = parse(CompareConfig, argv)
    with plain_errors():
        if len(config.runs) < 2:
            raise ConfigError(
                f"compare: expected two run folders or more, found {len(config.runs)}."
            )
        from posttrain.report.page import write_comparison

        say(f"report  {write_comparison(config.runs, config.output)}")
