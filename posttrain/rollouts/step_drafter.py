"""Guess by prediction modules, one step after the other, over a cache of their own.

    drafter = StepDrafter(heads)            # heads of kind mtp: posttrain.heads.load_heads

Module k reads at position i the state h^(k-1)_i and the token i + k, and predicts token i + k + 1
(DeepSeek-V3, 2412.19437, section 2.2). So it sees what it was trained to see: all positions of the
prompt and of the completion, with states of the model's own forwards. The last k - 1 of them have
guesses for tokens; once the right tokens are known they are computed again. Prompts cost one more
forward each, whatever the number of their completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from posttrain.rollouts.drafts import Draft, Kind, Row, of_drafted
from posttrain.rollouts.sampling import Sampling, choose


class Modules(Protocol):
    """Modules in sequence, as posttrain.heads.Heads has them; depth: how many."""

    depth: int

    def new_cache(self) -> Any:
        """Return an empty cache of one module."""
        ...

    def prompt_states(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the (T, D) states of the model at each token of each prompt."""
        ...

    def step(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        *,
        depth: int,
        cache: Any,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run a module on (R, L, D) more states; return its states, and (R, V) logits."""
        ...


class _New(NamedTuple):
    """States of one row that the modules have not seen: positions `start` to `end` - 1.

    tokens: those that follow each of them.
    """

    states: Tensor
    tokens: list[int]
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class StepDrafter:
    """Guesses a chain of as many tokens as there are modules."""

    needs_hidden, needs_states = True, True

    def __init__(self, heads: Modules) -> None:
        self.heads, self.most_guesses = heads, heads.depth

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Start from empty caches; prompts are read once someone asks for guesses."""
        self.sampling, self.ids = of_drafted(self.heads, sampling)
        self.prompts, self.numbers = list(map(tuple, prompts)), None
        self.caches = [self.heads.new_cache() for _ in range(self.heads.depth)]
        self.seen: list[Tensor | None] = [None] * self.heads.depth  # (R, slots) by depth
        self.late: list[Tensor | None] = [None] * self.heads.depth  # (R, 1, D), see _advance

    def _read_prompts(self) -> None:
        """Let the modules read the prompts up to their last states."""
        states = self.heads.prompt_states(self.prompts)
        parts = zip(states, self.prompts, strict=True)
        self._advance([_New(mine[:-1], list(prompt[1:]), 0) for mine, prompt in parts])

    def propose(self, rows: Sequence[Row], most: int, hidden: Tensor | None) -> list[Draft]:  # noqa: ARG002
        """See posttrain.rollouts.drafts.Drafter."""
        self._select(rows)
        fresh = []
        for row in rows:
            states = torch.cat(row.states)
            row.states.clear()
            tokens = [*row.prompt, *row.ids][-len(states) :]
            fresh.append(_New(states, tokens, len(row.prompt) + len(row.ids) - 1 - len(states)))
        guesses = self._advance(fresh, rows)
        kinds = [Kind("head", depth) for depth in range(self.heads.depth)]
        found = []
        for row, ids in zip(rows, guesses, strict=True):
            count = max(0, min(most, row.room - 1, len(ids)))
            found.append(Draft(ids[:count], kinds[:count]))
        return found

    def end(self, rows: Sequence[Row]) -> None:  # noqa: ARG002
        """Forget the batch; modules are trained elsewhere."""
        self.begin((), self.sampling)

    def _select(self, rows: Sequence[Row]) -> None:
        """Keep the rows that go on; at first each gets what its prompt has."""
        numbers = [row.number for row in rows]
        if numbers == self.numbers:
            return
        if self.numbers is None:
            self._read_prompts()
            old = [self.prompts.index(row.prompt) for row in rows]
        else:
            places = {number: place for place, number in enumerate(self.numbers)}
            old = [places[number] for number in numbers]
        self.numbers = numbers
        for depth, cache in enumerate(self.caches):
            cache.select(torch.tensor(old, device=self.seen[depth].device))
            self.seen[depth] = self.seen[depth][old]
            if self.late[depth] is not None:
                self.late[depth] = self.late[depth][old]

    def _advance(self, fresh: Sequence[_New], rows: Sequence[Row] = ()) -> list[list[int]]:
        """Run all modules over new states; return each row's guesses, if rows are given.

        The columns of module k are one state of the module before that waited for its token, and
        all that this has just computed. Rows with fewer new states have unseen columns between.
        """
        width = max(1, *(len(new.tokens) for new in fresh))
        known = [list(new.tokens) for new in fresh]  # and the guesses so far
        hidden = torch.stack([_padded(new.states, width) for new in fresh])
        for depth in range(self.heads.depth):
            if depth:
                late = hidden[:, :1] if self.late[depth] is None else self.late[depth]
                picked = [_column(new, depth, width) for new in fresh]
                waiting = hidden[list(range(len(fresh))), picked][:, None]
                hidden = torch.cat((late, hidden), 1)
                self.late[depth] = waiting
            tokens, positions = [], []
            for new, ids in zip(fresh, known, strict=True):
                unseen = [-1] * (width - len(new.tokens))
                more = ids + [0] * (depth if not rows else 0)
                tokens.append(more[:depth] + [0] * len(unseen) + more[depth:])
                before = range(new.start - depth, new.start)
                positions.append([*before, *unseen, *range(new.start, new.end)])
            ends = [[new.end - depth] for new in fresh]
            hidden, logits = self._step(hidden, tokens, positions, ends, depth)
            if rows:
                for ids, token in zip(known, self._chosen(logits, rows, depth), strict=True):
                    ids.append(token)
        return [ids[len(new.tokens) :] for ids, new in zip(known, fresh, strict=True)]

    def _step(
        self,
        hidden: Tensor,
        tokens: list[list[int]],
        positions: list[list[int]],
        ends: list[list[int]],
        depth: int,
    ) -> tuple[Tensor, Tensor]:
        """One module; from its position in `ends` on a row's columns have guesses for tokens."""
        device = hidden.device
        places = torch.tensor(positions, device=device)
        valid, length = places >= 0, places.shape[1]
        own = valid[:, None] & torch.ones(length, length, dtype=torch.bool, device=device).tril()
        own = own | torch.eye(length, dtype=torch.bool, device=device)  # the unseen see themselves
        past = self.seen[depth]
        if past is None:
            past = valid[:, :0]
        mask = torch.cat((past[:, None].expand(-1, length, -1), own), 2)[:, None]
        found = self.heads.step(
            hidden,
            torch.tensor(tokens, device=device),
            places.clamp(min=0),
            depth=depth + 1,
            cache=self.caches[depth],
            mask=mask,
        )
        final = valid & (places < torch.tensor(ends, device=device))
        self.seen[depth] = torch.cat((past, final), 1)
        return found

    def _chosen(self, logits: Tensor, rows: Sequence[Row], depth: int) -> list[int]:
        """The guesses at this depth, at the numbers of their places."""
        places = [min(len(row.ids) + depth, len(row.uniforms) - 1) for row in rows]
        numbers = [row.uniforms[place] for row, place in zip(rows, places, strict=True)]
        stop_ids = torch.tensor(self.sampling.stop_ids, dtype=torch.long, device=logits.device)
        uniform = torch.tensor(numbers, device=logits.device)
        steps = torch.tensor(places, device=logits.device)
        chosen = choose(logits, uniform, self.sampling, stop_ids, steps)[0]
        return (chosen if self.ids is None else self.ids.to(chosen.device)[chosen]).tolist()


def _padded(states: Tensor, width: int) -> Tensor:
    """(m, D) -> (width, D), zeros first."""
    return torch.nn.functional.pad(states, (0, 0, width - len(states), 0))


def _column(new: _New, depth: int, width: int) -> int:
    """Find where the module before has the state that waits for its token: at end - depth."""
    wanted = new.end - depth
    if wanted >= new.start:
        return depth - 1 + width - (new.end - wanted)
    return max(0, wanted - (new.start - depth + 1))
