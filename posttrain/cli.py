"""`posttrain COMMAND …`: the tools that are not recipes.

    posttrain verify --gold 1/2 --answer '\\boxed{0.5}'
    posttrain verify answers.jsonl

Commands import what they need when they are called, so that `posttrain --help` is instant.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from posttrain.errors import ConfigError
from posttrain.run.options import plain_errors

# name: (module with a `main(argv)`, what it does)
COMMANDS = {
    "verify": ("posttrain.commands.verify", "judge answers against golds, and say by which rule"),
    "data": ("posttrain.commands.data", "look at data files and clean them"),
    "merge": ("posttrain.commands.merge", "one model out of several with the same shapes"),
}


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("--help", "-h"):
        print("usage: posttrain COMMAND …   (posttrain COMMAND --help says more)\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:10}{what}")
        return
    with plain_errors():
        if argv[0] not in COMMANDS:
            near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(
                f"expected a command ({', '.join(COMMANDS)}), found '{argv[0]}'.{hint}"
            )
        module, _ = COMMANDS[argv[0]]
        importlib.import_module(module).main(argv[1:])


if __name__ == "__main__":
    main()
