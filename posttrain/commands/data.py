"""`posttrain data COMMAND …`: inspect data files and clean them, without loading them whole.

    posttrain data check my.jsonl --tokenizer data/tiny_tokenizer
    posttrain data dedup my.jsonl --output unique.jsonl

`COMMANDS` is the one table: a command's settings, whose docstring is its help, and the function
that runs it and returns its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from posttrain.errors import ConfigError
from posttrain.run.console import say
from posttrain.run.options import option, parse, plain_errors
from posttrain.run.sources import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.hygiene.check import CheckReport
    from posttrain.hygiene.contamination import ContaminationResult
    from posttrain.hygiene.convert import ConvertResult
    from posttrain.hygiene.duplicates import DedupResult
    from posttrain.hygiene.mix import PartResult, SplitResult
    from posttrain.hygiene.rows import Row

MAX_SHOWN = 20  # overlaps printed; all are counted, and written when rows are removed


@dataclass(kw_only=True)
class Input:
    """The setting that every command has: the files to read."""

    dataset: list[str] = option(help="data files, or Hub names; .jsonl, .json, .csv, .parquet, .gz")


@dataclass(kw_only=True)
class Compared(Input):
    """Settings of commands that compare rows with each other."""

    columns: list[str] = option([], "columns to compare; none: the prompt side")
    threshold: float = option(
        0.6,
        "rows count as near-duplicates from this share of common words and word pairs on",
        above=0,
        at_most=1,
    )


@dataclass(kw_only=True)
class Tokenized(Input):
    """Settings of commands that see rows as training does."""

    template: str = option("auto", "prompt format, as in training")
    max_length: int = option(2048, "tokens of the longest example, as in training", at_least=2)
    load_as: Literal["documents", "pairs", "prompts", "unpaired", "steps"] | None = option(
        None, "the loader, documents for load_documents; none: the first that the format has"
    )


@dataclass(kw_only=True)
class CheckConfig(Tokenized):
    """Report what is in a file; exit status 1 when something would break training."""

    tokenizer: str | None = option(None, "folder or Hub name; none: template and mask go unchecked")
    near: bool = option(True, "look for near-duplicates, not only exact ones")


def check(config: CheckConfig) -> CheckReport:
    """Print the report; exit with status 1 if something would break training."""
    from posttrain.hygiene import check as checking
    from posttrain.hygiene.report import print_report
    from posttrain.hygiene.rows import RowStream

    report = checking.check(
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


def dedup(config: DedupConfig) -> DedupResult:
    """Write the rows without duplicates, and print the counts."""
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

    against: list[str] = option(help="benchmark files; their prompt side is looked for")
    columns: list[str] = option([], "columns of the dataset to look at; none: all texts")
    against_columns: list[str] = option([], "columns of the benchmark; none: its prompt side")
    num_words: int = option(13, "words in a row that make an overlap", at_least=2)
    remove: bool = option(False, "write the other rows to output")
    output: str | None = option(None, "with remove: new .jsonl file; .removed.jsonl comes beside")

    def check(self) -> None:
        """Raise ConfigError unless an output is named exactly where one is written."""
        if self.remove and not self.output:
            raise ConfigError("output: expected a file for the rows that stay, found none.")
        if self.output and not self.remove:
            raise ConfigError("output: expected none without --remove; nothing is written.")


def decontaminate(config: DecontaminateConfig) -> ContaminationResult:
    """Print overlaps with the benchmark; write the other rows if asked to."""
    from posttrain.hygiene import contamination
    from posttrain.hygiene.rows import RowStream

    benchmark = contamination.Benchmark(
        RowStream(config.against), columns=config.against_columns, num_words=config.num_words
    )
    shown: list[Row] = []

    def print_first(row: Row, overlap: contamination.Overlap) -> None:
        if len(shown) < MAX_SHOWN:
            shown.append(row)
            say(f"{row.where} <- {overlap.benchmark_row}: {overlap.text}")

    result = contamination.decontaminate(
        RowStream(config.dataset),
        benchmark,
        config.output,
        columns=config.columns,
        show=print_first,
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
    """Sample rows of several files into one, each file with its weight."""

    output: str = option(help="new .jsonl file")
    weights: list[float] = option([], "relative sampling rate of each file; none: its size")
    temperature: float = option(
        1.0,
        "without weights: rates are sizes to the power 1/temperature; large: equal rates",
        above=0,
    )
    when_exhausted: Literal["stop", "continue", "repeat"] = option(
        "stop", "what to do at a file's end: stop, continue with the others, or repeat it"
    )
    num_rows: int | None = option(None, "most rows to write; required for repeat", at_least=1)
    seed: int = option(0, "seed of the sampling", at_least=0)
    source_column: str = option("source", "column that gets the file's name; '' for none")

    def check(self) -> None:
        """Raise ConfigError for weights that do not fit the files, or an endless mixture."""
        if self.weights and len(self.weights) != len(self.dataset):
            raise ConfigError(
                f"weights: expected one for each of {len(self.dataset)} files, found "
                f"{len(self.weights)}."
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise ConfigError(f"weights: expected numbers above 0, found {self.weights}.")
        if self.weights and self.temperature != 1:
            raise ConfigError("temperature: expected none beside weights: it shapes the sizes.")
        if self.when_exhausted == "repeat" and self.num_rows is None:
            raise ConfigError("num_rows: expected a number, for files are repeated without end.")


def mix(config: MixConfig) -> list[PartResult]:
    """Write the mixture, and print each file's part in it."""
    from posttrain.hygiene import mix as mixing

    weights = config.weights or mixing.tempered(
        [mixing.count_rows(source) for source in config.dataset], config.temperature
    )
    results = mixing.mix(
        [mixing.Part(*part) for part in zip(config.dataset, weights, strict=True)],
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
        0.05, "approximate share of the rows for testing", above=0, at_most=1
    )
    seed: int = option(0, "seed of the split", at_least=0)


def split(config: SplitConfig) -> SplitResult:
    """Write both files, and print their sizes."""
    from posttrain.hygiene import mix as splitting
    from posttrain.hygiene.rows import RowStream

    result = splitting.split(
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
    """Print a row as training sees it, with its trained tokens marked."""

    tokenizer: str = option(help="folder or Hub name of the tokenizer")
    row: int = option(1, "number of the row: its line in JSONL", at_least=1)
    boundaries: bool = option(False, "mark the boundary between two tokens")


def show(config: ShowConfig) -> list[tuple[str, list[int], list[bool]]]:
    """Print the row with its trained tokens marked."""
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
    """Write the rows in another format, if it can hold all of their meaning."""

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


def convert(config: ConvertConfig) -> ConvertResult:
    """Write the rows in the other format, and print the counts."""
    from posttrain.hygiene import convert as converting
    from posttrain.hygiene.rows import RowStream

    result = converting.convert(RowStream(config.dataset), config.output, to=config.to)
    removed = [f"{count:,} {reason}" for reason, count in result.removed.items()]
    say(
        f"{result.num_rows:,} rows read, {result.num_written:,} written to {config.output}"
        + (f"; not converted: {', '.join(removed)}" if removed else "")
    )
    return result


COMMANDS = {
    "check": (CheckConfig, check),
    "dedup": (DedupConfig, dedup),
    "decontaminate": (DecontaminateConfig, decontaminate),
    "mix": (MixConfig, mix),
    "split": (SplitConfig, split),
    "show": (ShowConfig, show),
    "convert": (ConvertConfig, convert),
}


def _need(load_as: str | None) -> str | None:
    from posttrain.data.formats import LOADERS

    return {loader.removeprefix("load_"): need for need, loader in LOADERS.items()}.get(load_as)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from posttrain.models.load import load_tokenizer

    return load_tokenizer(name)


def main(argv: Sequence[str]) -> None:
    """Run the command that `argv` names first; files before the first flag are the `--dataset`."""
    if not argv or argv[0] in ("--help", "-h"):
        print("usage: posttrain data COMMAND FILE …   (posttrain data COMMAND --help says more)\n")
        for name, (config_class, _) in COMMANDS.items():
            print(f"  {name:15}{config_class.__doc__}")
        return
    name, *rest = argv
    with plain_errors():
        if name not in COMMANDS:
            near = did_you_mean(name, COMMANDS)
            raise ConfigError(f"expected one of {', '.join(COMMANDS)}; found '{name}'.{near}")
    config_class, run = COMMANDS[name]
    if rest and not rest[0].startswith("-"):
        rest = ["--dataset", *rest]
    config = parse(config_class, rest)
    with plain_errors():
        run(config)
