"""LLM post-training on one packed, prefix-shared core. Importing this loads nothing heavy."""

__version__ = "0.1.0"
