"""`posttrain data COMMAND …`: looking at data, and cleaning it, without loading it whole.

`COMMANDS` is the one table: a command's settings, and the function that runs it.

`posttrain data COMMAND`: the table of posttrain/commands/data.py as commands.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.errors import ConfigError
from posttrain.run.console import say
from posttrain.run.options import option, parse, plain_errors

MAX_SHOWN = 20  # overlaps printed; all are counted, and written when rows are removed


@dataclass(kw_only=True)
class Input:
    dataset: list[str] = option(help="data files, or Hub names; .jsonl, .json, .csv, .parquet, .gz")


@dataclass(kw_only=True)
class Compared(Input):
    columns: list[str] = option([], "columns that are compared; none: the prompt side")
    threshold: float = option(
        0.6, "share of words and word pairs in common from which rows are alike", above=0, at_most=1
    )


@dataclass(kw_only=True)
class Tokenized(Input):
    template: str = option("auto", "prompt format, as in training")
    max_length: int = option(2048, "longest example in tokens, as in training", at_least=2)
    load_as: Literal["documents", "pairs", "prompts", "unpaired", "steps"] | None = option(
        None, "the loader, as in load_documents; none: the first that the format has"
    )


@dataclass(kw_only=True)
class CheckConfig(Tokenized):
    """Report what is in a file; exit status 1 when something would break training."""

    tokenizer: str | None = option(None, "folder or Hub name; none: template, mask not checked")
    near: bool = option(True, "look for near-duplicates, not only exact ones")


def check(config: CheckConfig):
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


def dedup(config: DedupConfig):
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
        if self.remove and not self.output:
            raise ConfigError("output: expected a file for the rows that stay, found none.")
        if self.output and not self.remove:
            raise ConfigError("output: expected none without --remove; nothing is written.")


def decontaminate(config: DecontaminateConfig):
    from posttrain.hygiene import contamination
    from posttrain.hygiene.rows import RowStream

    benchmark = contamination.Benchmark(
        RowStream(config.against), columns=config.against_columns, num_words=config.num_words
    )
    shown = []

    def show(row, overlap) -> None:
        if len(shown) < MAX_SHOWN:
            shown.append(row)
            say(f"{row.where} <- {overlap.benchmark_row}: {overlap.text}")

    result = contamination.decontaminate(
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
    """Draw rows from several files into one, each file with its weight."""

    output: str = option(help="new .jsonl file")
    weights: list[float] = option([], "how often each file is drawn from; none: by its size")
    temperature: float = option(
        1.0, "without weights: sizes to the power 1/temperature; large: all alike", above=0
    )
    when_exhausted: Literal["stop", "continue", "repeat"] = option(
        "stop", "at a file's end: stop, continue with the others, or repeat it"
    )
    num_rows: int | None = option(None, "rows to write at most; repeat needs it", at_least=1)
    seed: int = option(0, "seed of the draws", at_least=0)
    source_column: str = option("source", "column that gets the file's name; '' for none")

    def check(self) -> None:
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


def mix(config: MixConfig):
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
    """Write a training and a test file, near-duplicates on one side."""

    train_output: str = option(help="new .jsonl file of the rows for training")
    test_output: str = option(help="new .jsonl file of the rows for testing")
    test_fraction: float = option(0.05, "share of the rows for testing, about", above=0, at_most=1)
    seed: int = option(0, "seed of the sides", at_least=0)


def split(config: SplitConfig):
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
    """Print a row as training sees it, its trained tokens marked."""

    tokenizer: str = option(help="folder or Hub name of the tokenizer")
    row: int = option(1, "number of the row: its line in JSONL", at_least=1)
    boundaries: bool = option(False, "a line between two tokens")


def show(config: ShowConfig):
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
        "alpaca", "self_instruct", "messages", "sharegpt", "preference", "dialogue_pairs",
        "unpaired", "question_answer", "problem_answer", "problem_solution", "prompt_completion",
        "prompt_answer", "prompt", "text",
    ] = option(help="the format to write")  # fmt: skip


def convert(config: ConvertConfig):
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


def _tokenizer(name: str):
    from posttrain.models.load import load_tokenizer

    return load_tokenizer(name)


def main(argv: Sequence[str]) -> None:
    """`argv` without `posttrain data`; files before the first flag are the `--dataset`."""
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
