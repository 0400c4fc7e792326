"""Running untrusted code: where it cannot read, change, send or stay. See docs/sandbox.md."""

from posttrain.sandbox.interface import (
    Executor,
    Limits,
    RunResult,
    SandboxUnavailableError,
    Session,
    Value,
)
from posttrain.sandbox.sandbox import Sandbox

__all__ = [
    "Executor",
    "Limits",
    "RunResult",
    "Sandbox",
    "SandboxUnavailableError",
    "Session",
    "Value",
]
