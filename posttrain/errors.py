"""Errors for the person at the keyboard: each says what was expected, found, where, and the fix."""


class PosttrainError(Exception):
    """A mistake that the user can fix. Recipes print its message without a traceback and exit 2."""


class ConfigError(PosttrainError):
    """A flag, YAML key or combination of settings that cannot work."""


class DataError(PosttrainError):
    """A data file, row or field that cannot be used."""


class NonFiniteLossError(PosttrainError):
    """The loss or the gradient became NaN or infinite."""
