"""Guess the tokens that come next, for posttrain.rollouts.lookahead to verify.

    drafter = NGramDrafter()
    drafter.begin(prompts, sampling)
    drafts = drafter.propose(rows, most=8, hidden=None)     # one for each row, or an empty one
    drafter.end(rows)                                       # remembers the completions

A token is chosen by inverting the model's distribution at a number in [0, 1) that is known before
(posttrain.rollouts.sampling). So a guess inverts its own distribution at the same number: two
distributions that are alike then choose the same token nearly always, where a guess of the most
likely token would be right as often as that token is likely.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from posttrain.rollouts.sampling import Sampling, choose

MOST_AHEAD = 8  # guesses that follow each other
SIZES = (8, 4, 2)  # tokens of the runs whose followers are counted, from the most telling
# Followers counted in all; about 250 bytes each.
MOST_ENTRIES = 1 << 19


class Kind(NamedTuple):
    """Names what a guess rests on; how often guesses of a kind are right is measured.

    source: `ngram` or `head`. level: the place in SIZES, or the depth. rank: number of followers
    seen, by powers of two, or the rank among a head's tokens. prior: the chance before any is
    verified.
    """

    source: str
    level: int
    rank: int = 0
    prior: float = 0.5


@dataclass
class Draft:
    """Guesses for one row, parents before children.

    parents: for each token the place of the one that it continues: 0 is the row's next token, i the
    i-th guess; None where each continues the one before.
    """

    token_ids: list[int] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    parents: list[int] | None = None

    def parent(self, index: int) -> int:
        """Return the place of the token that guess `index` (from 0) continues."""
        return index if self.parents is None else self.parents[index]

    def kept(self, indices: Sequence[int]) -> Draft:
        """Return these guesses, in ascending order, with the parents of each among them."""
        places = {0: 0} | {old + 1: new + 1 for new, old in enumerate(indices)}
        parents = [places[self.parent(i)] for i in indices]
        is_chain = parents == list(range(len(parents)))
        return Draft(
            [self.token_ids[i] for i in indices],
            [self.kinds[i] for i in indices],
            None if is_chain else parents,
        )


@dataclass
class Row:
    """A completion in the making.

    ids: tokens that are chosen, the last of which the model has not been fed. uniforms: the number
    of each token of the completion. place: its row of the cache. states: (m, D) each, of the places
    that chose its tokens, until a drafter that needs them takes them.
    """

    number: int
    prompt: tuple[int, ...]
    uniforms: list[float]
    place: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    sampler_logps: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    steps: int = 0  # forwards that it took part in, its prompt's included
    is_stopped: bool = False

    @property
    def room(self) -> int:
        """Number of tokens that may still be chosen."""
        return len(self.uniforms) - len(self.ids)

    @property
    def goes_on(self) -> bool:
        """True until it has stopped, or is full."""
        return not self.is_stopped and self.room > 0


class Drafter(Protocol):
    """Anything that guesses tokens. Guesses may be wrong at the price of time alone."""

    needs_hidden: bool
    most_guesses: int  # in one draft

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Prepare for completions of these prompts."""
        ...

    def propose(self, rows: Sequence[Row], most: int, hidden: Tensor | None) -> list[Draft]:
        """Return guesses of what follows `row.ids`, at most `most` deep, for each row.

        hidden: (rows, D) states from which the last tokens of the rows were predicted.
        """
        ...

    def end(self, rows: Sequence[Row]) -> None:
        """Learn from completions that have ended."""
        ...


class Followers:
    """Counts which token followed each run of SIZES tokens in the texts of one prompt."""

    def __init__(self) -> None:
        self.tables: list[dict[int, dict[int, int]]] = [{} for _ in SIZES]
        self.num_entries = 0

    def add(self, ids: Sequence[int], start: int) -> None:
        """Count the tokens from `start` on of a text."""
        for size, table in zip(SIZES, self.tables, strict=True):
            for end in range(max(start, size), len(ids)):
                counts = table.setdefault(hash(tuple(ids[end - size : end])), {})
                token = ids[end]
                self.num_entries += token not in counts
                counts[token] = counts.get(token, 0) + 1

    def next(self, tail: list[int], uniform: float | None) -> tuple[int, Kind] | None:
        """Guess the token after `tail` by the counts of its longest known end.

        uniform: inverts their distribution, in the order of token ids as the model's; None takes
        the most frequent.
        """
        for level, (size, table) in enumerate(zip(SIZES, self.tables, strict=True)):
            counts = table.get(hash(tuple(tail[-size:]))) if len(tail) >= size else None
            if counts:
                total = sum(counts.values())
                token = _inverted(counts, total, uniform)
                seen = min(total.bit_length(), 4) + (4 if len(counts) > 1 else 0)
                return token, Kind("ngram", level, seen)
        return None


def _inverted(counts: dict[int, int], total: int, uniform: float | None) -> int:
    if len(counts) == 1:
        return next(iter(counts))
    if uniform is None:
        return max(counts, key=counts.__getitem__)
    level = uniform * total
    for token in sorted(counts):
        level -= counts[token]
        if level < 0:
            return token
    return token


@dataclass
class _Known:
    """Remembers texts of a prompt. unread: those that are not counted yet, with their starts."""

    followers: Followers = field(default_factory=Followers)
    unread: list[tuple[list[int], int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        texts = sum(len(ids) - start for ids, start in self.unread)
        return self.followers.num_entries + len(SIZES) * texts


class NGramDrafter:
    """Guesses what followed the same tokens in the prompt, its other completions, or earlier ones.

    Completions of earlier calls are remembered by prompt, those used last the longest, up to
    `most_entries` followers. Nothing is counted before someone asks for a guess.
    """

    needs_hidden, most_guesses = False, MOST_AHEAD

    def __init__(self, most_entries: int = MOST_ENTRIES) -> None:
        self.most_entries, self.num_entries = most_entries, 0
        self.known: OrderedDict[tuple[int, ...], _Known] = OrderedDict()
        self._read: dict[int, int] = {}  # row -> tokens of its completion that are counted

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Make room for these prompts, which were used last."""
        self.is_greedy = not sampling.temperature
        self._read = {}
        for prompt in map(tuple, prompts):
            if prompt not in self.known:
                self.known[prompt] = _Known(unread=[(list(prompt), 0)])
                self.num_entries += self.known[prompt].size
            self.known.move_to_end(prompt)

    def propose(self, rows: Sequence[Row], most: int, hidden: Tensor | None) -> list[Draft]:  # noqa: ARG002
        """See `Drafter`."""
        for row in rows:
            self._count(row)
        return [self._guess(row, min(most, row.room - 1)) for row in rows]

    def end(self, rows: Sequence[Row]) -> None:
        """Remember completions; the prompts that were used longest ago are forgotten for them."""
        for row in rows:
            known = self.known[row.prompt]
            text, start = self._text(row)
            known.unread.append((text, start))
            self.num_entries += len(SIZES) * (len(text) - start)
        while self.num_entries > self.most_entries and self.known:
            _, oldest = self.known.popitem(last=False)
            self.num_entries -= oldest.size

    def _text(self, row: Row) -> tuple[list[int], int]:
        """The part of a row's text that is not counted yet, behind what it follows."""
        done = self._read.get(row.number, 0)
        before = max(SIZES)
        text = [*row.prompt[-before:], *row.ids]
        cut = max(0, len(text) - len(row.ids) + done - before)
        return text[cut:], len(text) - len(row.ids) + done - cut

    def _count(self, row: Row) -> None:
        known = self.known[row.prompt]
        before = known.size
        text, start = self._text(row)
        for ids, begin in (*known.unread, (text, start)):
            known.followers.add(ids, begin)
        known.unread = []
        self._read[row.number] = len(row.ids)
        self.num_entries += known.size - before

    def _guess(self, row: Row, most: int) -> Draft:
        followers, draft = self.known[row.prompt].followers, Draft()
        longest = max(SIZES)
        tail = [*row.prompt[-longest:], *row.ids[-longest:]]
        for place in range(len(row.ids), len(row.ids) + most):
            found = followers.next(tail, None if self.is_greedy else row.uniforms[place])
            if found is None:
                break
            draft.token_ids.append(found[0])
            draft.kinds.append(found[1])
            tail.append(found[0])
        return draft


class Heads(Protocol):
    """Heads that predict tokens beyond the next one, as Medusa's; depth: how many of them."""

    depth: int
    drafted_ids: Sequence[int] | None  # ascending ids that logits are of; None: of all

    def draft_logits(self, hidden: Tensor, tokens: Tensor) -> Tensor | list[Tensor]:
        """(rows, D) states and the (rows,) tokens they predicted -> (rows, V) logits by depth."""
        ...


def of_drafted(heads: object, sampling: Sampling) -> tuple[Sampling, Tensor | None]:
    """Return the settings for logits of the tokens that heads draft, and their ids; None: all."""
    ids = getattr(heads, "drafted_ids", None)
    if not ids:
        return sampling, None
    stops = tuple(ids.index(token) for token in sampling.stop_ids if token in ids)
    return replace(sampling, stop_ids=stops, vocabulary=None, never=()), torch.tensor(ids)


class HeadDrafter:
    """Guesses by heads on the model's last hidden state, in a chain or in a tree.

    Args:
        tree: Paths of ranks (posttrain.rollouts.trees), none deeper than the heads. Rank 0 is the
            head's distribution inverted at the token's number, the others are its most likely
            tokens beside. None: a chain of rank 0.
    """

    needs_hidden = True

    def __init__(self, heads: Heads, tree: Sequence[Sequence[int]] | None = None) -> None:
        self.heads = heads
        self.most_guesses = len(tree) if tree else MOST_AHEAD
        self.tree = sorted(map(tuple, tree), key=lambda path: (len(path), path)) if tree else None
        self.ranks = max((max(path) for path in self.tree or ()), default=0)  # beside rank 0
        self.shapes: dict[int, tuple[list, list, list]] = {}  # by depth

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:  # noqa: ARG002
        """Take the settings that the heads' distributions are restricted by."""
        self.sampling, self.ids = of_drafted(self.heads, sampling)

    def propose(self, rows: Sequence[Row], most: int, hidden: Tensor | None) -> list[Draft]:
        """See `Drafter`."""
        tokens = torch.tensor([row.ids[-1] for row in rows], device=hidden.device)
        by_depth = self.heads.draft_logits(hidden, tokens)[:most]
        ranked = self._ranked(torch.cat(list(by_depth)), rows, len(by_depth))
        return [
            self._draft([of_depth[i] for of_depth in ranked][: max(0, row.room - 1)])
            for i, row in enumerate(rows)
        ]

    def end(self, rows: Sequence[Row]) -> None:
        """Learn nothing: heads are trained elsewhere."""

    def _ranked(self, logits: Tensor, rows: Sequence[Row], depth: int) -> list[list[list[int]]]:
        """Tokens by rank, for each depth and row; logits: (depth x rows, V)."""
        device, last = logits.device, len(rows[0].uniforms) - 1
        # A row with no room so deep is given any number: its guess is cut off.
        places = [min(len(row.ids) + ahead, last) for ahead in range(depth) for row in rows]
        numbers = [row.uniforms[p] for row, p in zip([*rows] * depth, places, strict=True)]
        first, _ = choose(
            logits,
            torch.tensor(numbers, device=device),
            self.sampling,
            torch.tensor(self.sampling.stop_ids, dtype=torch.long, device=device),
            torch.tensor(places, device=device),
        )
        first = first[:, None]
        if self.ranks:
            number = min(self.ranks, logits.shape[1] - 1)
            others = logits.scatter(1, first, -torch.inf).topk(number, dim=-1).indices
            first = torch.cat((first, others), 1)
        if self.ids is not None:
            first = self.ids.to(device)[first]
        return first.unflatten(0, (depth, len(rows))).tolist()

    def _draft(self, ranked: list[list[int]]) -> Draft:
        """ranked: for each depth the tokens by rank."""
        if len(ranked) not in self.shapes:
            self.shapes[len(ranked)] = self._shape(len(ranked), len(ranked[0]) if ranked else 0)
        spots, kinds, parents = self.shapes[len(ranked)]
        return Draft([ranked[depth][rank] for depth, rank in spots], kinds, parents)

    def _shape(self, depth: int, ranks: int) -> tuple[list, list, list | None]:
        """The depth and rank of each guess, its kind, and the place of its parent."""
        paths = self.tree or [(0,) * (ahead + 1) for ahead in range(depth)]
        paths = [path for path in paths if len(path) <= depth and max(path) < ranks]
        places = {(): 0} | {path: place + 1 for place, path in enumerate(paths)}
        kinds = [Kind("head", len(p) - 1, p[-1], 0.5 if p[-1] == 0 else 0.1) for p in paths]
        spots, parents = [(len(p) - 1, p[-1]) for p in paths], [places[p[:-1]] for p in paths]
        return spots, kinds, None if parents == list(range(len(paths))) else parents
