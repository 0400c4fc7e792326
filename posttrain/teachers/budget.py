"""How much may be asked: requests, tokens and money, counted over all of a run."""

from dataclasses import dataclass

from posttrain.data.self_instruct.exchange import Answer, Request, estimate_tokens
from posttrain.errors import ConfigError

PRICE_UNIT = 1_000_000  # prices are given for a million tokens


@dataclass
class Usage:
    """Sums over answers. `num_sent` counts every attempt, `num_failed` requests without answer."""

    num_requests: int = 0
    num_sent: int = 0
    num_failed: int = 0
    num_estimated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: Answer) -> None:
        self.num_requests += 1
        self.num_sent += answer.attempts
        self.num_failed += answer.finish_reason == "failed"
        self.num_estimated += answer.estimated
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Budget:
    """Limits, and what is spent. A request is allowed if its longest answer would still fit.

    max_requests counts every sending, retries too; max_tokens prompt and answer; max_cost is in
    the currency of the two prices, which are per million tokens. None: no limit. The tokens of
    a sending that failed are unknown, and count as none.
    """

    def __init__(
        self,
        *,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        prompt_price: float = 0.0,
        completion_price: float = 0.0,
    ) -> None:
        if max_cost is not None and not (prompt_price or completion_price):
            raise ConfigError(
                "max_cost: expected prices with it, found none. Set prompt_price and "
                "completion_price, per million tokens."
            )
        self.max_requests, self.max_tokens, self.max_cost = max_requests, max_tokens, max_cost
        self.prompt_price, self.completion_price = prompt_price, completion_price
        self.spent = Usage()
        self._reserved: dict[str, tuple[int, int]] = {}  # name -> most (prompt, answer) tokens

    @property
    def cost(self) -> float:
        """What is spent, at the given prices."""
        return self._price(self.spent.prompt_tokens, self.spent.completion_tokens)

    def refusal(self, request: Request) -> str:
        """Why this request may not be sent beside those under way; empty if it may."""
        most = [*self._reserved.values(), _most_tokens(request)]
        prompt = self.spent.prompt_tokens + sum(tokens for tokens, _ in most)
        completion = self.spent.completion_tokens + sum(tokens for _, tokens in most)
        wanted = {
            "requests": (self.spent.num_sent + len(most), self.max_requests),
            "tokens": (prompt + completion, self.max_tokens),
            "cost": (self._price(prompt, completion), self.max_cost),
        }
        for name, (amount, limit) in wanted.items():
            if limit is not None and amount > limit:
                return f"max_{name} is {limit:,}; with the next request it could be {amount:,.6g}"
        return ""

    def reserve(self, request: Request) -> None:
        self._reserved[request.name] = _most_tokens(request)

    def settle(self, request: Request, answer: Answer) -> None:
        """What the request took in the end."""
        self._reserved.pop(request.name, None)
        self.spent.add(answer)

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        prompt = prompt_tokens * self.prompt_price
        return (prompt + completion_tokens * self.completion_price) / PRICE_UNIT


def _most_tokens(request: Request) -> tuple[int, int]:
    return estimate_tokens(request.prompt), request.max_tokens
