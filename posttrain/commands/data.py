"""`posttrain data COMMAND …`: look at data, and clean it, without loading it whole.

    posttrain data dedup my.jsonl --output my.unique.jsonl

`COMMANDS` is the one table: a command's settings, and the function that runs it. The work is done
in posttrain/hygiene, which a command imports when it runs, so that `--help` is fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data.read import Row
    from posttrain.hygiene.check import CheckReport
    from posttrain.hygiene.contamination import ContaminationResult, Overlap
    from posttrain.hygiene.convert import ConvertResult
    from posttrain.hygiene.duplicates import DedupResult
    from posttrain.hygiene.mix import PartResult, SplitResult
    from posttrain.hygiene.report import Part

MAX_SHOWN = 20  # overlaps printed; all are counted, and written when rows are removed


@dataclass(kw_only=True)
class Input:
    """Settings of every command: the files that are read."""

    dataset: list[str] = option(help="data files (.jsonl, .json, .csv, .parquet, .gz) or Hub names")


@dataclass(kw_only=True)
class Compared(Input):
    """Settings of commands that compare rows with each other."""

    columns: list[str] = option([], "columns to compare; default: the prompt side")
    threshold: float = option(
        0.6,
        "rows are alike if they share at least this fraction of their words and word pairs",
        above=0,
        at_most=1,
    )


@dataclass(kw_only=True)
class Tokenized(Input):
    """Settings of commands that see rows as training does."""

    template: str = option("auto", "prompt format, as in training")
    max_length: int = option(2048, "longest example in tokens, as in training", at_least=2)
    load_as: Literal["documents", "pairs", "prompts", "unpaired", "steps"] | None = option(
        None, "load the rows as these; default: the first that their format allows"
    )


@dataclass(kw_only=True)
class CheckConfig(Tokenized):
    """Report what is in a file; exit status 1 when something would break training."""

    tokenizer: str | None = option(
        None, "folder or Hub name; without it, template and mask are not checked"
    )
    near: bool = option(True, "look for near-duplicates, not only exact ones")


def run_check(config: CheckConfig) -> CheckReport:
    """Print the report; SystemExit with status 1 when something would break training."""
    from posttrain.hygiene.check import check
    from posttrain.hygiene.report import print_report
    from posttrain.hygiene.rows import RowStream

    report = check(
        RowStream(config.dataset),
        tokenizer=_tokenizer(config.tokenizer) if config.tokenizer else None,
        need=_need(config.load_as),
        template=config.template,
        max_length=config.max_length,
        near=config.near,
    )
    print_report(report)
    if report.breaks:
        raise SystemExit(1)
    return report


@dataclass(kw_only=True)
class DedupConfig(Compared):
    """Write a file without duplicates; what was removed, and why, beside it."""

    output: str = option(help="new .jsonl file; .removed.jsonl and .clusters.jsonl come beside it")
    near: bool = option(True, "remove near-duplicates too, not only texts equal to the letter")


def run_dedup(config: DedupConfig) -> DedupResult:
    """Deduplicate, and print the counts."""
    from posttrain.hygiene.duplicates import deduplicate
    from posttrain.hygiene.rows import RowStream

    result = deduplicate(
        RowStream(config.dataset),
        config.output,
        columns=config.columns,
        threshold=config.threshold,
        near=config.near,
    )
    say(
        f"{result.num_rows:,} rows: {result.num_kept:,} kept in {config.output}, "
        f"{result.num_exact:,} exact and {result.num_near:,} near duplicates removed "
        f"({result.num_clusters:,} clusters)"
    )
    return result


@dataclass(kw_only=True)
class DecontaminateConfig(Input):
    """Find rows that hold text of a benchmark; remove them on request."""

    against: list[str] = option(help="benchmark files, whose prompt side is searched for")
    columns: list[str] = option([], "columns of the dataset to search; default: all texts")
    against_columns: list[str] = option([], "columns of the benchmark; default: its prompt side")
    num_words: int = option(13, "number of shared consecutive words that is an overlap", at_least=2)
    remove: bool = option(False, "write the rows without an overlap to output")
    output: str | None = option(
        None, "with remove: new .jsonl file; .removed.jsonl comes beside it"
    )

    def check(self) -> None:
        """Raise ConfigError for remove without output, or the reverse."""
        if self.remove and not self.output:
            raise ConfigError(
                "output: expected a file for the rows that stay, found none. Name one, or leave "
                "out --remove."
            )
        if self.output and not self.remove:
            raise ConfigError(
                "output: expected none without --remove, since nothing is written. Add --remove."
            )


def run_decontaminate(config: DecontaminateConfig) -> ContaminationResult:
    """Print the first overlaps and the counts."""
    from posttrain.hygiene.contamination import Benchmark, decontaminate
    from posttrain.hygiene.rows import RowStream

    benchmark = Benchmark(
        RowStream(config.against), columns=config.against_columns, num_words=config.num_words
    )
    shown = []

    def show(row: Row, overlap: Overlap) -> None:
        """Print an overlap, unless enough were."""
        if len(shown) < MAX_SHOWN:
            shown.append(row)
            say(f"{row.where} <- {overlap.benchmark_row}: {overlap.text}")

    result = decontaminate(
        RowStream(config.dataset), benchmark, config.output, columns=config.columns, show=show
    )
    more = result.num_overlapping - len(shown)
    if more:
        say(f"… and {more:,} more")
    fate = f"removed; the others are in {config.output}" if config.remove else "none removed"
    say(
        f"{result.num_overlapping:,} of {result.num_rows:,} rows overlap with "
        f"{len(result.benchmark_rows):,} of {result.num_benchmark_rows:,} benchmark rows; {fate}"
    )
    return result


@dataclass(kw_only=True)
class MixConfig(Input):
    """Mix rows of several files into one, each file with its weight."""

    output: str = option(help="new .jsonl file")
    weights: list[float] = option([], "sampling weight of each file; default: its number of rows")
    temperature: float = option(
        1.0,
        "without weights: rows to the power 1/temperature; the larger, the more equal",
        above=0,
    )
    when_exhausted: Literal["stop", "continue", "repeat"] = option(
        "stop", "at a file's end: stop, continue with the other files, or repeat the file"
    )
    num_rows: int | None = option(
        None, "largest number of rows to write; required with repeat", at_least=1
    )
    seed: int = option(0, "seed of the sampling", at_least=0)
    source_column: str = option("source", "column that gets the file's name; '' adds none")

    def check(self) -> None:
        """Raise ConfigError for settings that contradict each other."""
        if self.weights and len(self.weights) != len(self.dataset):
            raise ConfigError(
                f"weights: expected one for each of {len(self.dataset)} files, found "
                f"{len(self.weights)}."
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise ConfigError(f"weights: expected numbers above 0, found {self.weights}.")
        if self.weights and self.temperature != 1:
            raise ConfigError(
                "temperature: expected none beside weights, since it makes weights of the files' "
                "sizes. Leave out one of the two."
            )
        if self.when_exhausted == "repeat" and self.num_rows is None:
            raise ConfigError(
                "num_rows: expected a number with --when_exhausted repeat, since files are "
                "repeated without end."
            )


def run_mix(config: MixConfig) -> list[PartResult]:
    """Mix, and print what was taken from each file."""
    from posttrain.hygiene.mix import Part, count_rows, mix, tempered

    sizes = [] if config.weights else [count_rows(source) for source in config.dataset]
    weights = config.weights or tempered(sizes, config.temperature)
    results = mix(
        [Part(*part) for part in zip(config.dataset, weights, strict=True)],
        config.output,
        when_exhausted=config.when_exhausted,
        num_rows=config.num_rows,
        seed=config.seed,
        source_column=config.source_column,
    )
    for part in results:
        say(
            f"{part.source}: {part.num_written:,} rows written, of {part.num_rows:,} there "
            f"({part.num_written / part.num_rows:.2f} passes), probability {part.probability:.3f}"
        )
    say(f"{sum(part.num_written for part in results):,} rows in {config.output}")
    return results


@dataclass(kw_only=True)
class SplitConfig(Compared):
    """Write a training and a test file, with near-duplicates on the same side."""

    train_output: str = option(help="new .jsonl file of the rows for training")
    test_output: str = option(help="new .jsonl file of the rows for testing")
    test_fraction: float = option(
        0.05, "approximate fraction of the rows for testing", above=0, at_most=1
    )
    seed: int = option(0, "seed that decides which rows are for testing", at_least=0)


def run_split(config: SplitConfig) -> SplitResult:
    """Split, and print the counts."""
    from posttrain.hygiene.mix import split
    from posttrain.hygiene.rows import RowStream

    result = split(
        RowStream(config.dataset),
        config.train_output,
        config.test_output,
        test_fraction=config.test_fraction,
        seed=config.seed,
        columns=config.columns,
        threshold=config.threshold,
    )
    share = result.num_test / (result.num_train + result.num_test)
    say(
        f"{result.num_train:,} rows in {config.train_output}, {result.num_test:,} ({share:.1%}) in "
        f"{config.test_output}; {result.num_clusters:,} clusters, the largest of "
        f"{result.largest_cluster:,} rows"
    )
    return result


@dataclass(kw_only=True)
class ShowConfig(Tokenized):
    """Print a row as training sees it, its trained tokens marked."""

    tokenizer: str = option(help="folder or Hub name of the tokenizer")
    row: int = option(1, "number of the row: its line in JSONL", at_least=1)
    boundaries: bool = option(False, "draw a line between tokens")


def run_show(config: ShowConfig) -> list[Part]:
    """Print the row's parts."""
    from posttrain.hygiene.report import find_row, print_example, tokens_of
    from posttrain.hygiene.rows import RowStream

    tokenizer = _tokenizer(config.tokenizer)
    row = find_row(RowStream(config.dataset), config.row)
    parts = tokens_of(
        row,
        tokenizer,
        need=_need(config.load_as),
        template=config.template,
        max_length=config.max_length,
    )
    print_example(parts, tokenizer, boundaries=config.boundaries)
    return parts


@dataclass(kw_only=True)
class ConvertConfig(Input):
    """Write the rows in another format, where nothing of their meaning is lost."""

    output: str = option(help="new .jsonl file; .removed.jsonl comes beside it")
    to: Literal[
        "alpaca",
        "self_instruct",
        "messages",
        "sharegpt",
        "preference",
        "dialogue_pairs",
        "unpaired",
        "question_answer",
        "problem_answer",
        "problem_solution",
        "prompt_completion",
        "prompt_answer",
        "prompt",
        "text",
    ] = option(help="the format to write")


def run_convert(config: ConvertConfig) -> ConvertResult:
    """Convert, and print the counts."""
    from posttrain.hygiene.convert import convert
    from posttrain.hygiene.rows import RowStream

    result = convert(RowStream(config.dataset), config.output, to=config.to)
    removed = [f"{count:,} {reason}" for reason, count in result.removed.items()]
    say(
        f"{result.num_rows:,} rows read, {result.num_written:,} written to {config.output}"
        + (f"; not converted: {', '.join(removed)}" if removed else "")
    )
    return result


COMMANDS = {
    "check": (CheckConfig, run_check),
    "dedup": (DedupConfig, run_dedup),
    "decontaminate": (DecontaminateConfig, run_decontaminate),
    "mix": (MixConfig, run_mix),
    "split": (SplitConfig, run_split),
    "show": (ShowConfig, run_show),
    "convert": (ConvertConfig, run_convert),
}


def main(argv: Sequence[str]) -> None:
    """Run `posttrain data` with the arguments after it.

    Files before the first flag are the `--dataset`.
    """
    if not argv or argv[0] in ("--help", "-h"):
        print("usage: posttrain data COMMAND FILE …   (posttrain data COMMAND --help says more)\n")
        for name, (config_class, _) in COMMANDS.items():
            print(f"  {name:15}{config_class.__doc__}")
        return
    name, *rest = argv
    with plain_errors():
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"expected one of {', '.join(COMMANDS)}; found '{name}'.{hint}")
    config_class, run = COMMANDS[name]
    if rest and not rest[0].startswith("-"):
        rest = ["--dataset", *rest]
    config = parse(config_class, rest)
    with plain_errors():
        run(config)


def _need(load_as: str | None) -> str | None:
    """The key of NEEDS whose loader is load_<load_as>."""
    from posttrain.data.formats import NEEDS

    return {need.loader.removeprefix("load_"): name for name, need in NEEDS.items()}.get(load_as)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from posttrain.models.load import load_tokenizer

    return load_tokenizer(name)
