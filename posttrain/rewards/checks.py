"""Checks before the first step: rewards fit the data's columns, and each row can be scored.

    check_rewards(rewards, prompts.column_names)          # ConfigError for a misspelt column
    find_unscorable(rewards, {"answer": [...]})           # {17: "correct: gold cannot be read: …"}

    load_reward("mine.py:short", {"math": math_reward})   # a reward by its name, or a user's own

The first reads the signatures of rewards, the second the rows of the data. No reward is called.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from posttrain.errors import ConfigError
from posttrain.rewards.pieces import Reward, Values, accepted, innermost, is_number

CALL_KEYWORDS = ("prompts", "completions", "completion_ids")


def check_rewards(
    rewards: Mapping[str, tuple[Reward, float]],
    columns: Sequence[str],
    gates: Mapping[str, str] | None = None,
) -> None:
    """Check that each reward can be called with this data. Reads signatures and calls nothing.

    A reward's `accuracy` or `reward`, which is a reward that it calls, is checked too.

    Args:
        rewards: Name to (reward, weight).
        columns: The data's column names.
        gates: Part to the part that it depends on.

    Raises:
        ConfigError: No reward has a weight other than 0, an entry is not (reward, weight), a gate
            names no reward, or a reward requires an argument that is neither a column, nor
            `prompts`, `completions`, `completion_ids` or `trainer_state`, or is positional only.
    """
    for name, entry in rewards.items():
        if not (isinstance(entry, tuple) and len(entry) == 2 and callable(entry[0])):
            raise ConfigError(
                f"reward {name!r}: expected a pair (function, weight), found {entry!r}."
            )
        reward, weight = entry
        if not (is_number(weight) and math.isfinite(weight)):
            raise ConfigError(f"reward {name!r}: expected a finite weight, found {weight!r}.")
        _check_arguments(name, reward, columns)
        for inner in map(inspect.signature(reward).parameters.get, ("accuracy", "reward")):
            if inner and callable(inner.default):  # the default, or bound by a partial
                _check_arguments(name, inner.default, columns)
    if not any(weight for _, weight in rewards.values()):
        raise ConfigError("expected a reward with a weight other than 0, found none to learn from.")
    for part, gate in (gates or {}).items():
        if part == gate or not {part, gate} <= set(rewards):
            raise ConfigError(
                f"gate {part!r}: {gate!r}: expected the names of two rewards; "
                f"there are {', '.join(rewards)}."
            )


def find_unscorable(
    rewards: Mapping[str, tuple[Reward, float]], columns: Mapping[str, Sequence[object]]
) -> dict[int, str]:
    """Map each row (from 0) that no completion could be scored for to the reason.

    Only rewards with an attribute `find_unscorable` can tell: f(column) -> pairs (row, problem),
    called with the columns that it names (with `**columns` all), and with the arguments that
    partials have bound.
    """
    found: dict[int, str] = {}
    for name, (reward, _) in rewards.items():
        find = getattr(innermost(reward), "find_unscorable", None)
        if find is None:
            continue
        given = {**columns, **_bound(reward)}
        for row, problem in find(**accepted(find, given)):
            found.setdefault(row, f"{name}: {problem}")
    return found


def _bound(reward: Reward) -> dict[str, object]:
    """Return the keywords that partials of the reward have bound; the outermost win."""
    bound: dict[str, object] = {}
    while isinstance(reward, functools.partial):
        bound = {**reward.keywords, **bound}
        reward = reward.func
    return bound


def reward_identity(reward: Reward) -> str:
    """Identify a reward for a cache of its scores: name, source file's text, and bound arguments.

    The state of objects and the text of other files that the reward calls are left out.
    """
    function = innermost(reward)
    function = function if inspect.isroutine(function) else type(function)
    try:
        source = inspect.getsource(inspect.getmodule(function))
    except (TypeError, OSError):  # written in C, or typed at a prompt
        source = function.__module__
    return repr((function.__qualname__, sorted(_bound(reward).items()), source))


def reward_facts(rewards: Mapping[str, tuple[Reward, float]]) -> dict[str, object]:
    """Collect facts about the rewards for a run's metadata, as {"reward_facts": {name: facts}}.

    The facts are the result of a reward's attribute `describe`, a function without arguments, if it
    has one.
    """
    facts = {
        name: innermost(reward).describe()
        for name, (reward, _) in rewards.items()
        if hasattr(innermost(reward), "describe")
    }
    return {"reward_facts": facts} if facts else {}


def _check_arguments(name: str, reward: Reward, columns: Sequence[str]) -> None:
    function = _callable_name(reward)
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError) as error:  # some callables written in C have no signature
        raise ConfigError(
            f"reward {name!r} ({function}): expected a signature, and found none that can be read. "
            "Wrap it in a function that names them."
        ) from error
    known = {*columns, *CALL_KEYWORDS, "trainer_state"}
    for argument in parameters:
        if argument.kind is argument.POSITIONAL_ONLY:
            raise ConfigError(
                f"reward {name!r} ({function}): {argument.name!r} can only be given by position, "
                "and rewards are called by keyword. Remove the '/' from its signature."
            )
        is_variadic = argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
        if is_variadic or argument.default is not argument.empty or argument.name in known:
            continue
        nearest = difflib.get_close_matches(argument.name, columns, n=1, cutoff=0.5)
        hint = f" Nearest: {nearest[0]!r}." if nearest else ""
        raise ConfigError(
            f"reward {name!r} ({function}) needs {argument.name!r}, and the data has no such "
            f"column.{hint} Columns found: {', '.join(columns) or 'none'}. Rename the column, or "
            f"bind the argument: functools.partial({function}, {argument.name}=…)."
        )


def _callable_name(reward: Reward) -> str:
    function = innermost(reward)
    return getattr(function, "__name__", type(function).__name__)


def load_reward(name: str, known: Mapping[str, Reward], *, setting: str = "reward") -> Reward:
    """Look up the reward `name` in the table `known`, or load it if it reads `FILE.py:FUNCTION`.

    Args:
        name: A name in the table, or a file and a function in it.
        known: Our rewards by their names.
        setting: The setting that has the name, for messages.

    Raises:
        ConfigError: The name is unknown, the file is missing or cannot be imported, or it has no
            such function.
    """
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return FileReward(path, function)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{setting}: expected {', '.join(known)} or FILE.py:FUNCTION, found {name!r}.{hint}"
    )


class FileReward:
    """The function `name` of the file `path`. It pickles as these two, so that workers load it."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = str(Path(path).resolve()), name
        self.__wrapped__ = _function(self.path, name)  # lends its signature and marks

    def __call__(self, **arguments: object) -> Values:
        return self.__wrapped__(**arguments)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return FileReward, (self.path, self.name)


def _function(path: str, name: str) -> Reward:
    found = getattr(_module(path), name, None)
    if callable(found):
        return found
    functions = [n for n, f in vars(_module(path)).items() if inspect.isfunction(f)]
    raise ConfigError(
        f"reward: expected a function {name!r} in {path}; it has {', '.join(functions) or 'none'}."
    )


@functools.cache
def _module(path: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"reward: expected a Python file, found none at {path}.")
    # Under a unique name: a file called math.py must not be taken for another module.
    name = f"_reward_file_{file.stem}_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # whatever a module's top level raises, sys.exit() included
        del sys.modules[name]
        raise ConfigError(
            f"reward: {path} cannot be imported ({type(error).__name__}: {error})."
        ) from error
    return module
