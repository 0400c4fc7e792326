"""Loading a reward by name: one of ours, or a function in a file of the user.

    load_reward("math", {"math": math_reward})            # math_reward
    load_reward("my_rewards.py:my_reward", {})            # the function of that file

The file is an ordinary module, and may import its neighbours. Its functions can be sent to worker
processes, which load the file by its path again.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from posttrain.errors import ConfigError
from posttrain.rewards.pieces import Reward, Values


def load_reward(name: str, known: Mapping[str, Reward], **options: object) -> Reward:
    """Look up the reward `name` in the table `known`, or load it if it reads `FILE.py:FUNCTION`.

    Args:
        name: A name in the table, or a file and a function in it.
        known: Our rewards by their names.
        options: Options such as `prefilled_think`, bound to the reward if its signature has them.

    Raises:
        ConfigError: The name is unknown, the file is missing or cannot be imported, or it has no
            such function.
    """
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        reward: Reward = FileReward(path, function)
    elif name in known:
        reward = known[name]
    else:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"reward: expected {', '.join(known)} or FILE.py:FUNCTION, found {name!r}.{hint}"
        )
    taken = {o: v for o, v in options.items() if o in inspect.signature(reward).parameters}
    return functools.partial(reward, **taken) if taken else reward


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
