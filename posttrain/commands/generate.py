"""`posttrain generate`: completions of a prompt or of a file of prompts, as JSON lines.

    posttrain generate runs/sft/model --prompt 'What is 17 + 25?' --template alpaca
    posttrain generate runs/sft/model --dataset prompts.jsonl --output completions.jsonl
    posttrain generate runs/medusa/model --dataset prompts.txt --lookahead auto --num_generations 4

A line holds prompt (as the model saw it), completion, num_tokens, ended (false: cut at the limit)
and number (of the completion among those of its prompt). Text files hold one prompt a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from posttrain.commands.completing import Completer, CompletingConfig, with_model_first
from posttrain.errors import ConfigError, DataError
from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import Acceptance, LookaheadName

BATCH_SIZE = 256  # prompts that are completed at once


@dataclass(kw_only=True)
class Config(CompletingConfig):
    """Settings of one call."""

    model: str = option(help="folder or Hub name of the model; also as the first argument")
    prompt: str | None = option(None, "one prompt")
    dataset: str | None = option(None, "prompts: a file, folder or Hub name; .txt: one a line")
    output: str | None = option(None, "file for the completions (.jsonl); none: the screen")
    num_generations: int = option(1, "completions of each prompt", at_least=1)
    lookahead: LookaheadName = option(
        "none", "guess tokens to generate faster, with the same completions"
    )
    acceptance: Acceptance = option(
        "exact", "guesses that are kept; typical: likely ones, so completions differ (Medusa)"
    )

    def check(self) -> None:
        """Raise ConfigError unless there is one source of prompts, and a free place to write."""
        if (self.prompt is None) == (self.dataset is None):
            found = "neither" if self.prompt is None else "both"
            raise ConfigError(f"prompt: expected either --prompt or --dataset, found {found}.")
        if self.output and Path(self.output).exists():
            raise ConfigError(
                f"output: expected a new file, found '{self.output}'. Name another, or remove it."
            )


def main(argv: Sequence[str]) -> None:
    """Write completions as the flags in `argv` say; remarks go to stderr."""
    config = parse(Config, with_model_first(list(argv)))
    with plain_errors():
        records = complete(config)
        if not config.output:
            for record in records:
                print(json.dumps(record, ensure_ascii=False), flush=True)
            return
        from posttrain.run.folder import whole_file

        with whole_file(config.output) as partial_path, partial_path.open("w") as file:
            count = 0
            for count, record in enumerate(records, start=1):  # noqa: B007
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        _remark(f"{count} completions written to {config.output}")


def complete(config: Config) -> Iterator[dict]:
    """Yield a record for each completion, in the order of the prompts."""
    from posttrain.models.beside import heads_beside
    from posttrain.rollouts.generator import HFGenerator
    from posttrain.rollouts.options import lookahead_of

    source = read_prompts(config)
    heads = partial(heads_beside, config.model)
    ahead = lookahead_of(config.lookahead, heads, config.acceptance)
    completer = Completer(config.model, config)
    say = _remark if config.dataset else lambda _: None
    prompts, sampling = completer.prompts(source, say), completer.sampling
    generator = HFGenerator(completer.model, lookahead=ahead)
    for start in range(0, len(prompts), BATCH_SIZE):
        rows = prompts[start : start + BATCH_SIZE]
        seeds = [config.seed + start + place for place in range(len(rows["prompt_ids"]))]
        groups = generator.generate(
            rows["prompt_ids"], sampling, config.num_generations, seeds=seeds
        )
        for prompt, group in zip(rows["prompt"], groups, strict=True):
            for number, completion in enumerate(group):
                yield {
                    "prompt": prompt,
                    "completion": completer.text(completion.token_ids),
                    "num_tokens": len(completion.token_ids),
                    "ended": completion.token_ids[-1] in sampling.stop_ids,
                    "number": number,
                }


def read_prompts(config: Config) -> str | list[dict]:
    """Return what load_prompts takes: the name of a source, or rows."""
    if config.dataset is None:
        return [{"prompt": config.prompt}]
    path = Path(config.dataset)
    if path.suffix != ".txt":
        return config.dataset
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [{"prompt": line} for line in lines if line.strip()]
    if not rows:
        raise DataError(f"{path}: no prompts. The file is empty.")
    return rows


def _remark(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
