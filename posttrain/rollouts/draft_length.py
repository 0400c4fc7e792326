"""Choose how many guesses are verified, by what a token of a forward costs and what guesses gain.

    controller = Controller()
    drafts = controller.chosen(drafts, num_rows)
    controller.learn(step)                  # what the forward took, and which guesses were right

A forward of N tokens is taken to cost a + b N seconds, a line fitted to the last ones. A guess that
is wrong costs b. One that is right costs nothing, for its token would have been computed anyway,
and saves its row a forward; a forward is saved, and a with it, when the slowest row has been spared
one. So of what plain decoding would have cost, the cost of wrong guesses less the forwards that are
certainly saved is kept below `loss`, however the guesses turn out: guessing begins once plain
batches have earned what a batch with guesses may cost at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.rollouts.drafts import Draft, Kind

LOSS = 0.03  # share of plain decoding's time that wrong guesses may cost
EXPLORED = 0.2  # share of it that goes to guesses that look as if they did not pay
MEMORY = 0.98  # weight of a forward against that of the next one, in the fit
MOST_KEPT = 200.0  # verified guesses of a kind, after which older ones count less
# Forwards differ by less than this share of their tokens: a and b cannot be told apart.
EVEN = 0.05
UNKNOWN = 0.25  # chance from which guesses are tried before a and b can be
HOST = (
    2e-5  # seconds that guessing takes on the host for a row and a forward, before it is measured
)
MOST_PATIENCE = 64
OUTLIER = 3.0  # times the expected seconds; more is something else that the machine did


@dataclass
class Cost:
    """The line a + b N through the seconds that forwards of N tokens took, the last ones most."""

    weight: float = 0.0
    tokens: float = 0.0  # weighted means
    seconds: float = 0.0
    variance: float = 0.0
    covariance: float = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Take one more forward into the fit."""
        if self.weight > 5:
            seconds = min(seconds, OUTLIER * self.of(num_tokens))
        self.weight = self.weight * MEMORY + 1
        share = 1 / self.weight
        gap, late = num_tokens - self.tokens, seconds - self.seconds
        self.tokens += share * gap
        self.seconds += share * late
        self.variance += share * ((1 - share) * gap * gap - self.variance)
        self.covariance += share * ((1 - share) * gap * late - self.covariance)

    @property
    def is_known(self) -> bool:
        """True where a and b can be told apart."""
        return self.variance > (EVEN * self.tokens) ** 2

    @property
    def per_token(self) -> float:
        """b; what is not known to be fixed counts as the tokens'."""
        most = self.seconds / self.tokens if self.tokens else 0.0
        return min(max(self.covariance / self.variance, 0.0), most) if self.is_known else most

    @property
    def fixed(self) -> float:
        """a, at least 0."""
        return max(0.0, self.seconds - self.per_token * self.tokens)

    def of(self, num_tokens: float) -> float:
        """Seconds of a forward."""
        return self.fixed + self.per_token * num_tokens


@dataclass
class Step:
    """One forward as it turned out.

    Attributes:
        rows: Live rows, each of which was fed a token besides its guesses.
        guesses: Tokens that were guessed. emitted: Tokens that completions gained.
        lead: Forwards that the slowest live row has been spared since the batch began.
        seconds, drafting, host: What the forward took, what drafters did, and all else.
        verified: For each guess whose parent was right its kind, its depth and whether it was.
    """

    rows: int
    guesses: int
    emitted: int = 0
    lead: int = 0
    seconds: float = 0.0
    drafting: float = 0.0
    host: float = 0.0
    verified: list[tuple[Kind, int, bool]] = field(default_factory=list)


@dataclass
class Controller:
    """Chooses guesses, and keeps the account of what they cost.

    Attributes:
        loss: The most that guessing may cost, as a share of plain decoding's time.
        balance: Seconds that wrong guesses may cost at the moment.
    """

    loss: float = LOSS
    cost: Cost = field(default_factory=Cost)
    rates: dict[Kind, list[float]] = field(default_factory=dict)  # right, verified
    balance: float = 0.0
    explored: float = 0.0
    host: float = HOST  # of a row and a forward, guesses or not
    drafting: float = HOST  # on top, where drafters are asked
    lead: int = 0
    patience: int = 1  # doubled by each batch that lost
    begun: float = 0.0

    def ready(self, num_rows: int, max_tokens: int) -> bool:
        """True if the account can bear a batch in which no guess is right."""
        least = num_rows * (max_tokens * self.host + self.cost.per_token)
        return self.balance >= self.patience * least

    def earn(self, seconds: float) -> None:
        """Take the time of plain decoding into the account."""
        self.balance += self.loss * seconds
        self.explored += EXPLORED * self.loss * seconds

    def begin(self) -> None:
        """Begin a batch of rows."""
        self.lead, self.begun = 0, self.balance

    def end(self) -> None:
        """End it, and become more patient if it gained nothing."""
        lost = self.balance <= self.begun
        self.patience = min(2 * self.patience, MOST_PATIENCE) if lost else 1

    def may_draft(self, num_rows: int) -> bool:
        """False while the account has no room for guessing, let alone for a wrong guess."""
        least = self.cost.per_token + num_rows * (self.host + self.drafting)
        return bool(self.cost.weight) and self.balance >= least

    def rate(self, kind: Kind) -> float:
        """Return the share of right guesses of a kind."""
        right, verified = self.rates.get(kind, (0.0, 0.0))
        return (right + 2 * kind.prior) / (verified + 2)

    def chances(self, draft: Draft) -> list[float]:
        """Return for each guess the chance that it and all before it on its path are right."""
        reached = [1.0]
        for index, kind in enumerate(draft.kinds):
            reached.append(reached[draft.parent(index)] * self.rate(kind))
        return reached[1:]

    def chosen(self, drafts: Sequence[Draft], num_rows: int) -> list[Draft]:
        """Return the guesses that are worth their cost, as far as the account allows."""
        wrong, gain = self.cost.per_token, self.cost.fixed / num_rows
        least = wrong / (wrong + gain) if self.cost.is_known else UNKNOWN
        found = [
            (-chance, row, index)
            for row, draft in enumerate(drafts)
            for index, chance in enumerate(self.chances(draft))
        ]
        found.sort()  # a parent's chance is no smaller, and its index is
        room = min(len(found), int(self.balance / wrong)) if wrong else len(found)
        kept = [entry for entry in found if -entry[0] > least][:room]
        if not kept and found and self.explored >= wrong:
            self.explored -= wrong
            kept = found[:1]
        indices: list[list[int]] = [[] for _ in drafts]
        for _, row, index in kept:
            indices[row].append(index)
        return [
            draft.kept(sorted(mine)) if mine else Draft()
            for draft, mine in zip(drafts, indices, strict=True)
        ]

    def learn(self, step: Step) -> None:
        """Take a forward into the fit, the rates and the account."""
        self.cost.add(step.rows + step.guesses, step.seconds)
        spared, self.lead = step.lead - self.lead, step.lead
        wrong = step.guesses - (step.emitted - step.rows)
        fixed, each = self.cost.fixed, self.cost.per_token
        self.earn(fixed * (1 + spared) + each * step.emitted)
        self.balance += fixed * spared - each * wrong - step.host - step.drafting
        self.host += 0.05 * (step.host / step.rows - self.host)
        if step.drafting:
            self.drafting += 0.05 * (step.drafting / step.rows - self.drafting)
        for kind, _, is_right in step.verified:
            right, verified = self.rates.get(kind, (0.0, 0.0))
            fade = min(1.0, MOST_KEPT / (verified + 1))
            self.rates[kind] = [(right + is_right) * fade, (verified + 1) * fade]


class Unlimited(Controller):
    """Verifies every guess, whatever it costs."""

    def ready(self, num_rows: int, max_tokens: int) -> bool:  # noqa: ARG002
        """See `Controller`."""
        return True

    def may_draft(self, num_rows: int) -> bool:  # noqa: ARG002
        """See `Controller`."""
        return True

    def chosen(self, drafts: Sequence[Draft], num_rows: int) -> list[Draft]:  # noqa: ARG002
        """See `Controller`."""
        return list(drafts)
