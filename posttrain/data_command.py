"""`posttrain data COMMAND`: the table of posttrain/data/commands.py as commands."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from posttrain.config import parse, plain_errors
from posttrain.data.commands import COMMANDS
from posttrain.errors import ConfigError


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
