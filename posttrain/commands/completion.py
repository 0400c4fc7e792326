"""`posttrain completion bash|zsh|fish`: a script that completes commands, recipes and flags.

    eval "$(posttrain completion bash)"                      # in ~/.bashrc
    eval "$(posttrain completion zsh)"                       # in ~/.zshrc, after compinit
    posttrain completion fish > ~/.config/fish/completions/posttrain.fish

The words are written into the script, so that pressing tab starts no Python: write it anew after an
upgrade. Other words complete as files.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.run import settings
from posttrain.run.shipped import recipe_file, recipe_names

USAGE = "usage: posttrain completion bash|zsh|fish"


def words_of(commands: Sequence[str]) -> dict[str, list[str]]:
    """Return {words before: words that may follow}: commands, recipes, each recipe's flags."""
    names = recipe_names()
    words = {"": list(commands), "run": names, "plan": names}
    shared = {}
    for path in (Path(settings.__file__), *recipe_file("").parent.glob("*.py")):
        shared |= {name: node for name, node in _classes(path).items() if name != "Config"}
    for name in names:
        config = _classes(recipe_file(name))["Config"]
        words[f"run {name}"] = [*sorted(_flags(config, shared)), "--config", "--help"]
    return words


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    """Read the classes of a file without running it: a recipe's imports are slow."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def _flags(config: ast.ClassDef, shared: Mapping[str, ast.ClassDef]) -> set[str]:
    """Collect the flags of a class of settings and of those that it inherits from."""
    fields = [node.target for node in config.body if isinstance(node, ast.AnnAssign)]
    found = {f"--{field.id}" for field in fields if isinstance(field, ast.Name)}
    for base in config.bases:
        found |= _flags(shared[base.id], shared)
    return found


def bash(words: Mapping[str, Sequence[str]]) -> str:
    """Return the script for bash."""
    cases = "\n".join(
        f'        "{before}") words="{" ".join(w)}" ;;' for before, w in words.items()
    )
    return f"""_posttrain() {{
    local before="${{COMP_WORDS[*]:1:COMP_CWORD-1}}" words=""
    [[ $before == run\\ * ]] && before="run ${{COMP_WORDS[2]}}"
    case "$before" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _posttrain posttrain
"""


def zsh(words: Mapping[str, Sequence[str]]) -> str:
    """Return the script for zsh, which runs bash's."""
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash(words)}"


def fish(words: Mapping[str, Sequence[str]]) -> str:
    """Return the script for fish."""
    lines = []
    for before, after in words.items():
        place = "__fish_use_subcommand"
        if before:
            place = " && ".join(f"__fish_seen_subcommand_from {word}" for word in before.split())
        if before in ("run", "plan"):
            place += f"; and not __fish_seen_subcommand_from {' '.join(after)}"
        lines.append(f"complete -c posttrain -n '{place}' -a '{' '.join(after)}'")
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[Mapping[str, Sequence[str]]], str]] = {
    "bash": bash,
    "zsh": zsh,
    "fish": fish,
}


def main(argv: Sequence[str], commands: Sequence[str]) -> None:
    """Print the script of the shell that `argv` names; `commands` are those of `posttrain`."""
    if not argv or argv[0] in ("--help", "-h"):
        print(f"{USAGE}\n\n{__doc__.strip()}")
        return
    if argv[0] not in SHELLS or len(argv) > 1:
        found = " ".join(argv)
        raise ConfigError(f"completion: expected {', '.join(SHELLS)}, found '{found}'.")
    print(SHELLS[argv[0]](words_of(commands)), end="")
