"""Choose how many guesses are verified, by what a token of a forward costs and what guesses gain.

    controller = Controller()
    drafts = controller.chosen(drafts, num_rows)
    controller.learn(step)                  # what the forward took, and which guesses were right

A forward of N tokens is taken to cost a + b N seconds, a line fitted to the last ones. A guess that
is wrong costs b. One that is right costs nothing, for its token would have been computed anyway,
and saves its row a forward; a forward is saved, and a with it, when the slowest row has been spared
one. Another such line is fitted to the steps of plain decoding. What a step with guesses takes in
all (forward, drafters, work on the host) beyond what plain decoding is certain to need for the same
tokens is kept below `loss` of plain decoding's time, however the guesses turn out: guessing begins
once plain batches have earned what its first step may lose, and a batch is handed back to plain
decoding once the account is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.rollouts.drafts import Draft, Kind

LOSS = 0.03  # share of plain decoding's time that wrong guesses may cost
EXPLORED = 0.2  # share of it that goes to guesses that look as if they did not pay
EXPLORED_GAIN = 0.05  # share of what guesses have saved that goes there too
MEMORY = 0.98  # weight of a forward against that of the next one, in the fit
MOST_KEPT = 200.0  # verified guesses of a kind, after which older ones count less
# Forwards differ by less than this share of their tokens: a and b cannot be told apart.
EVEN = 0.05
UNKNOWN = 0.25  # chance from which guesses are tried before a and b can be
# Plain steps that one with guesses is taken to last longer before any is seen, and as many more for
# each so many rows: forwards have room for guesses, drafters do not.
UNTRIED, UNTRIED_ROWS = 1.0, 16
HANDOVER = 0.5  # plain steps that it takes to hand a batch back
IDLE = 4  # steps without a guess, after which a batch is handed back
RENEWED = 32  # one batch in so many is decoded plainly, to see what that takes by now
MOST_EXPLORED = 8  # guesses of a step that look as if they did not pay
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

    def add(self, num_tokens: float, seconds: float) -> None:
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
        seconds, other: What the forward took, and drafters and the work on the host.
        verified: For each guess whose parent was right its kind, its depth and whether it was.
    """

    rows: int
    guesses: int
    emitted: int = 0
    lead: int = 0
    seconds: float = 0.0
    other: float = 0.0
    verified: list[tuple[Kind, int, bool]] = field(default_factory=list)


@dataclass
class Controller:
    """Chooses guesses, and keeps the account of what they cost.

    Attributes:
        loss: The most that guessing may cost, as a share of plain decoding's time.
        cost: Of forwards with guesses, by tokens. plain: Of plain decoding's steps, by rows.
        balance: Seconds that guessing may cost at the moment.
        excess: What a step with guesses lasts longer than a plain one, as a share of it; None: not
            seen yet.
    """

    loss: float = LOSS
    cost: Cost = field(default_factory=Cost)
    plain: Cost = field(default_factory=Cost)
    rates: dict[Kind, list[float]] = field(default_factory=dict)  # right, verified
    balance: float = 0.0
    explored: float = 0.0
    excess: float | None = None
    lead: int = 0
    idle: int = 0  # steps without a guess, the last ones
    batches: int = 0  # since the last plain one
    patience: int = 1  # doubled by each batch that lost
    begun: float = 0.0

    def ready(self, num_rows: int) -> bool:
        """True if the account can bear a step in which no guess is right, and the way back."""
        is_known = bool(self.plain.weight) and self.batches < RENEWED
        return is_known and self.balance >= self.patience * self._least(num_rows)

    def _least(self, num_rows: int) -> float:
        excess = self.excess
        if excess is None:
            excess = UNTRIED * (1 + (num_rows - 1) / UNTRIED_ROWS)
        return (excess + HANDOVER) * self.plain.of(num_rows)

    def earn(self, num_tokens: int, num_steps: int, seconds: float) -> None:
        """Take steps of plain decoding into the account."""
        if num_steps:
            self.plain.add(num_tokens / num_steps, seconds / num_steps)
            self._earn(seconds)

    def _earn(self, seconds: float) -> None:
        self.balance += self.loss * seconds
        self.explored += EXPLORED * self.loss * seconds

    def begin(self) -> None:
        """Begin a batch of rows."""
        self.lead, self.idle, self.begun = 0, 0, self.balance
        self.batches += 1

    def end(self) -> None:
        """End it, and become more patient if it gained nothing."""
        lost = self.balance <= self.begun
        self.patience = min(2 * self.patience, MOST_PATIENCE) if lost else 1

    def goes_on(self, num_rows: int) -> bool:
        """False once the account cannot bear another step, or nothing is guessed."""
        return self.idle < IDLE and self.balance >= self._least(num_rows)

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
        if not self.cost.weight:
            wrong = self.plain.per_token
        found = [
            (-chance, row, index)
            for row, draft in enumerate(drafts)
            for index, chance in enumerate(self.chances(draft))
        ]
        found.sort()  # a parent's chance is no smaller, and its index is
        room = min(len(found), int(self.balance / wrong)) if wrong else len(found)
        num_kept = min(room, sum(-entry[0] > least for entry in found))
        if num_kept < len(found) and self.explored >= wrong:
            # Also behind kept ones: steps of one size would never tell a from b.
            more = min(max(MOST_EXPLORED, num_kept), int(self.explored / wrong)) if wrong else 1
            self.explored -= wrong * more
            num_kept += more
        kept = found[:num_kept]
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
        needed = self.plain.fixed * (1 + spared) + self.plain.per_token * step.emitted
        taken, usual = step.seconds + step.other, self.plain.of(step.rows)
        self._earn(needed)
        self.balance += needed - taken
        self.explored += EXPLORED_GAIN * max(0.0, needed - taken)
        if usual:
            found = max(0.0, taken / usual - 1)
            before = found if self.excess is None else self.excess
            self.excess = before + 0.2 * (found - before)
        self.idle = 0 if step.guesses else self.idle + 1
        for kind, _, is_right in step.verified:
            right, verified = self.rates.get(kind, (0.0, 0.0))
            fade = min(1.0, MOST_KEPT / (verified + 1))
            self.rates[kind] = [(right + is_right) * fade, (verified + 1) * fade]


class Unlimited(Controller):
    """Verifies every guess, whatever it costs."""

    def ready(self, num_rows: int) -> bool:  # noqa: ARG002
        """See `Controller`."""
        return True

    def goes_on(self, num_rows: int) -> bool:  # noqa: ARG002
        """See `Controller`."""
        return True

    def chosen(self, drafts: Sequence[Draft], num_rows: int) -> list[Draft]:  # noqa: ARG002
        """See `Controller`."""
        return list(drafts)
