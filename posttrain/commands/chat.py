"""`posttrain chat`: talk to a saved model, or to two of them side by side.

    posttrain chat runs/sft/model
    posttrain chat runs/sft/model runs/dpo/model --temperature 0

Tokens appear as they are sampled; what stands between <think> and </think> is dimmed. /new begins
another conversation, /exit or Ctrl-D ends. Templates that take one question alone (alpaca, r1_zero)
see no earlier turns.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.commands.completing import Completer, CompletingConfig, with_model_first
from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
OPENED = re.compile(r"\A.*?(?:</think>|\Z)", re.DOTALL)  # of a prompt that ends with <think>
# What could move the cursor or write to the terminal's title; newlines and tabs stay.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
REPLACEMENT = "\ufffd"  # a character whose last bytes are still to come


@dataclass(kw_only=True)
class Config(CompletingConfig):
    """Settings of a conversation."""

    models: list[str] = option(help="one or two models; also as the first arguments")
    system: str | None = option(None, "system turn, for templates that take conversations")

    def check(self) -> None:
        """Raise ConfigError for more than two models."""
        if not 1 <= len(self.models) <= 2:
            raise ConfigError(f"models: expected one or two, found {len(self.models)}.")


class Talk:
    """One model's side of a conversation."""

    def __init__(self, name: str, config: Config) -> None:
        self.completer, self.config = Completer(name, config), config
        if config.system and not self.completer.keeps_turns:
            raise ConfigError(
                f"system: expected a template that takes conversations for {name}, found "
                f"{config.template}. Take --template chat or plain."
            )
        self.restart()

    def restart(self) -> None:
        """Forget all turns but the system's."""
        system = self.config.system
        self.turns = [{"role": "system", "content": system}] if system else []

    def answer(self, question: str) -> Iterator[tuple[str, bool]]:
        """Yield the answer as it grows, and whether its prompt has opened <think> already."""
        from posttrain.rollouts.streaming import stream

        completer = self.completer
        if not completer.keeps_turns:
            self.restart()
        asked = [*self.turns, {"role": "user", "content": question}]
        (row,) = completer.prompts([{"prompt": asked}])
        opened = row["prompt"].rstrip().endswith("<think>")
        ids: list[int] = []
        text = ""
        for token in stream(
            completer.model, row["prompt_ids"], completer.sampling, self.config.seed
        ):
            ids.append(token)
            text = completer.text(ids)
            yield text.rstrip(REPLACEMENT), opened
        self.turns = [*asked, {"role": "assistant", "content": text}]


def shown(text: str, opened: bool) -> Text:
    """Return the text for a terminal: thinking dimmed, control characters left out.

    opened: the text goes on within <think>. Nothing in it is taken for markup.
    """
    from rich.text import Text

    styled = Text(CONTROL.sub("", text))
    if opened:
        styled.stylize("dim", 0, OPENED.match(styled.plain).end())
    for thought in THINKING.finditer(styled.plain):
        styled.stylize("dim", *thought.span())
    return styled


def print_one(console: Console, talk: Talk, question: str) -> None:
    """Print the answer of one model, each piece as it comes."""
    done = 0
    for text, opened in talk.answer(question):
        styled = shown(text, opened)
        console.print(styled[done:], end="", soft_wrap=True)
        done = len(styled)
    console.print()


def print_two(console: Console, talks: Sequence[Talk], question: str) -> None:
    """Print the answers of two models in two columns, token by token in turn."""
    from rich.live import Live
    from rich.table import Table

    answers = [talk.answer(question) for talk in talks]
    texts = [("", False) for _ in talks]
    with Live(console=console, refresh_per_second=8, vertical_overflow="visible") as live:
        running = set(range(len(talks)))
        while running:
            for place in sorted(running):
                try:
                    texts[place] = next(answers[place])
                except StopIteration:
                    running.discard(place)
            table = Table(expand=True)
            for talk in talks:
                table.add_column(shown(talk.completer.name, False), ratio=1)
            table.add_row(*(shown(*text) for text in texts))
            live.update(table)


def main(argv: Sequence[str]) -> None:
    """Read questions from the terminal, or from stdin line by line, until it ends."""
    config = parse(Config, with_model_first(list(argv), "--models"))
    with plain_errors():
        from rich.console import Console

        talks = [Talk(name, config) for name in config.models]
        if not all(talk.completer.keeps_turns for talk in talks):
            say("each question stands alone: the template takes no earlier turns")
        converse(talks, Console(file=sys.stdout, highlight=False))


def converse(talks: Sequence[Talk], console: Console) -> None:
    """Answer the lines of stdin, one by one."""
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if question == "/exit":
            return
        if question == "/new":
            for talk in talks:
                talk.restart()
        elif len(talks) == 1 and question:
            print_one(console, talks[0], question)
        elif question:
            print_two(console, talks, question)
