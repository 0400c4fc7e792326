"""A sandbox in which untrusted code can read, change, send and leave nothing: docs/sandbox.md.

The modules of this package are our side of the trust boundary. Those of `inside` run in the cage,
together with `wire`, the one module that both sides load.
"""

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
