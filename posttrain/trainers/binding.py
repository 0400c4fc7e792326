"""A loss with its settings fixed, as recipes do it from flags: `bind(dpo_loss, beta=0.1)`."""

import functools
import inspect
from collections.abc import Callable

from torch import Tensor

from posttrain.errors import ConfigError


def bind(loss: Callable[..., Tensor], **settings: float | None) -> Callable[..., Tensor]:
    """The loss with those settings fixed that are not None.

    Raises ConfigError for a setting that the loss does not have: it would be ignored.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    parameters = inspect.signature(loss).parameters.values()
    function = loss.func if isinstance(loss, functools.partial) else loss
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"--{name}: {function.__name__} has no such setting; "
                f"it has {', '.join(known) or 'none'}."
            )
    return functools.partial(loss, **given)
