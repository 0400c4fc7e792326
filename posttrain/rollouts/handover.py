"""Go on plainly with rows that have been decoded with guesses, at a pace of their own.

    Resumed(decoding, rows).complete()          # decoding: posttrain.rollouts.ahead_decoding's

Rows differ in length, and plain decoding writes one slot of the cache for all: so the rows are
copied once, each to where its last token lies in the same slot. Numbers are those of the rows' own
places, so the tokens stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.packed.batch import upload
from posttrain.rollouts.drafts import Row
from posttrain.rollouts.generator import Cache, Decoding

if TYPE_CHECKING:
    from posttrain.rollouts.ahead_decoding import AheadDecoding


class Resumed(Decoding):
    """The rest of R rows, each of which ends when it is full."""

    def __init__(self, ahead: AheadDecoding, rows: Sequence[Row]) -> None:
        self.model, self.sampling, self.tokenizer = ahead.model, ahead.sampling, ahead.tokenizer
        self.device, self.stop_ids, self.record = ahead.device, ahead.stop_ids, None
        self.live, self.num_steps = rows, 0
        sizes = [len(row.prompt) + len(row.ids) - 1 for row in rows]  # tokens in the cache
        parts = (
            [row.place for row in rows],
            sizes,
            [len(row.ids) for row in rows],
            [row.room for row in rows],
            [row.ids[-1] for row in rows],
            [row.number for row in rows],
        )
        parts = upload(parts, dtype=torch.long, device=self.device)
        places, self.positions, self.done, self.room, last, numbers = parts
        end, room = max(sizes), max(row.room for row in rows)
        self.first = end - self.positions
        starts = ahead.prompt_slots - ahead.lengths[places]
        self.cache = self._copied(ahead, places, starts, end, room)
        slots = torch.arange(end + room, device=self.device)
        self.visible = slots >= self.first[:, None]
        self.rows = torch.arange(len(rows), device=self.device)
        self.alive = torch.ones_like(self.rows, dtype=torch.bool)
        columns = (self.done[:, None] + slots[:room]).clamp(max=ahead.noise.shape[1] - 1)
        self.noise, self.last = ahead.noise[numbers[:, None], columns], last

    def _copied(
        self, ahead: AheadDecoding, places: Tensor, starts: Tensor, end: int, room: int
    ) -> Cache:
        """(R, h, slots, d) of these rows, whose tokens end before slot `end`."""
        index = torch.arange(end, device=self.device) - self.first[:, None] + starts[:, None]
        index, cache = index.clamp(min=0)[:, None], Cache()
        for states, mine in ((ahead.cache.keys, cache.keys), (ahead.cache.values, cache.values)):
            while states:  # the old ones are let go one by one
                state = states.pop(0)
                heads = torch.arange(state.shape[1], device=self.device)[:, None]
                size = (len(places), state.shape[1], end + room, state.shape[3])
                mine.append(state.new_empty(size))
                mine[-1][:, :, :end] = state[places[:, None, None], heads, index]
        cache.slot = end
        return cache

    def complete(self) -> None:
        """Give each row the rest of its tokens."""
        self._advance(self.last)
        found = self.run(self.noise)
        for row, more in zip(self.live, found, strict=True):
            row.ids += more.token_ids
            row.logps += more.logps
            row.sampler_logps += more.sampler_logps
            row.is_stopped = more.finish_reason == "stop"

    def _place(self, step: int) -> Tensor:
        return self.done[self.rows] + step

    def _end(self, ends: Tensor, length: int) -> None:
        super()._end(ends, length)
        full = self.alive & (self.room[self.rows] <= length)
        lengths = self.lengths[self.rows]
        self.lengths[self.rows] = torch.where(full, length, lengths)
        self.alive = self.alive & ~full
        self.num_steps = length

    def _search_strings(self, tokens: Tensor, start: int) -> None:
        """See `Decoding`; what came before the handover is read again, for strings cross it."""
        before, own = [list(row.ids) for row in self.live], self.rows.tolist()
        lengths = self.lengths[self.rows].clamp(max=tokens.shape[1])
        read = torch.cat((lengths[:, None], tokens), 1).tolist()
        rows = [
            (before[row] + ids[1 : 1 + ids[0]], len(before[row]) + start)
            for row, ids in zip(own, read, strict=True)
        ]
        ends = self.sampling.string_ends(rows, self.tokenizer)
        self._end_strings(
            [end - len(before[row]) if end else 0 for row, end in zip(own, ends, strict=True)]
        )
