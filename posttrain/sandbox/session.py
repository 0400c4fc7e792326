"""Sessions: a module in the sandbox that answers calls, as `Sandbox.open` returns it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from posttrain.sandbox import wire
from posttrain.sandbox.exchange import Exchange, conclude
from posttrain.sandbox.interface import Limits, Value
from posttrain.sandbox.wire import PlainData


class LocalSession:
    """Code executed as the module `solution`, waiting for calls. Close it, best by `with`.

    Output of the code is discarded. If the module itself failed, every request returns that error.
    """

    def __init__(
        self, exchange: Exchange | Value, limits: Limits, on_close: Callable[[], None]
    ) -> None:
        """Make a session over this exchange; with a Value, one that was over before it began."""
        self._exchange = exchange
        self._limits = limits
        self._on_close = on_close
        self._over = exchange if isinstance(exchange, Value) else None
        self._is_closed = False

    def call(
        self,
        name: str,
        args: Sequence[PlainData] = (),
        kwargs: Mapping[str, PlainData] | None = None,
    ) -> Value:
        """Call the module's function `name` with plain data."""
        return self._ask(("call", name, list(args), dict(kwargs or {})))

    def evaluate(self, expression: str) -> Value:
        """Evaluate a Python expression in the module's namespace."""
        return self._ask(("evaluate", expression))

    def _ask(self, request: tuple[PlainData, ...]) -> Value:
        if self._is_closed:
            raise ValueError("the session is closed")
        if self._over:
            return self._over
        try:
            self._exchange.send(request)
        except wire.WireError as problem:
            return Value("failed", detail=f"the request cannot be sent: {problem}")
        try:
            answer = self._exchange.next_message()
        except wire.WireError as problem:
            return Value("error", detail=f"a malformed answer: {problem}")
        if answer is None:
            self._over = self._last_value()
            return self._over
        return read_answer(answer)

    def _last_value(self) -> Value:
        status, exit_code, detail = conclude(self._exchange.ending, self._limits)
        if status == "ok":
            return Value("error", detail=f"ended with exit code {exit_code} instead of answering")
        return Value(status, detail=detail)

    def close(self) -> None:
        """End the session. Nothing of it remains."""
        if self._is_closed:
            return
        self._is_closed = True
        if isinstance(self._exchange, Exchange):
            self._exchange.close()
        self._on_close()

    def __enter__(self) -> LocalSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_answer(answer: tuple[PlainData, ...]) -> Value:
    """Read a session's message as a Value. Whatever the code made of it, this does not raise."""
    if len(answer) == 2:
        kind, content = answer
        if kind == "value":
            return Value("ok", content)
        if kind == "raised" and type(content) is str:
            return Value("error", detail=content)
    return Value("error", detail="a malformed answer")
