"""Errors that are for the person at the keyboard: what was expected, found, where, what to do."""


class PosttrainError(Exception):
    """Something the user can mend. Recipes print the message without a traceback and exit 2."""


class ConfigError(PosttrainError):
    """A flag, a YAML key or a combination of settings that cannot work."""


class DataError(PosttrainError):
    """A data file, row or field that cannot be used."""
