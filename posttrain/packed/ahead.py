"""Attention where rows of a cache are fed several tokens each in one forward, as drafts are.

    ahead = Ahead.of(feeds, num_rows, device)
    model(input_ids=ahead.input_ids, position_ids=ahead.positions, past_key_values=cache,
          packed=ahead, …)

The tokens of all rows form one packed row, so linear layers see no padding; attention gathers them
by row of the cache. A row's tokens form a tree: each sees what the cache holds of its row, its
ancestors and itself. In a chain every token continues the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.packed.batch import upload
from posttrain.packed.kernels import dense_attention, sees

if TYPE_CHECKING:
    from posttrain.packed.kernels import Rules


@dataclass(frozen=True)
class Feed:
    """The tokens that a row of the cache is fed: the next one of its sequence, and a draft.

    Attributes:
        row: The row of the cache.
        first: The slot of the row's first token, so that of position p is first + p.
        position: That of the next token.
        parents: For each token of the draft the place of the token that it continues, where the
            next token has place 0; None for a chain.
    """

    row: int
    first: int
    position: int
    token_ids: Sequence[int]
    parents: Sequence[int] | None = None

    def depths(self) -> Sequence[int]:
        """Tokens from the next one to each token."""
        if self.parents is None:
            return range(len(self.token_ids))
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths


@lru_cache(maxsize=256)
def _lines(parents: tuple[int, ...] | None, size: int, width: int) -> Tensor:
    """(size, width) for each token of a feed which places it sees: its ancestors' and its own."""
    above = range(-1, size - 1) if parents is None else (-1, *parents)
    lines = torch.zeros(size, width, dtype=torch.bool)
    for place, parent in enumerate(above):
        if parent >= 0:
            lines[place] = lines[parent]
        lines[place, place] = True
    return lines


@dataclass
class Ahead:
    """Stands in for the layout where R rows of a cache are fed N tokens, a row at most n of them.

    Attributes:
        input_ids, positions: (1, N).
        rows, places, depths, slots: (N,) for each token its row, its place in its feed, how far it
            lies ahead, and the slot of its keys and values.
        seen: (R, n, slots) the slots that a query sees.
        is_even: True where every row is fed n tokens.
    """

    input_ids: Tensor
    positions: Tensor
    rows: Tensor
    places: Tensor
    depths: Tensor
    slots: Tensor
    seen: Tensor
    first: Tensor
    is_even: bool
    masks: dict[tuple, Tensor] = field(default_factory=dict)  # by window and chunk

    @staticmethod
    def of(feeds: Sequence[Feed], num_rows: int, device: torch.device) -> Ahead:
        """Index feeds, whose tokens are packed in their order."""
        sizes = [len(feed.token_ids) for feed in feeds]
        longest = max(sizes)
        end = max(f.first + f.position + size for f, size in zip(feeds, sizes, strict=True))
        has_trees = any(feed.parents is not None for feed in feeds)
        parts = (
            [token for feed in feeds for token in feed.token_ids],
            [feed.row for feed in feeds for _ in feed.token_ids],
            [place for size in sizes for place in range(size)],
            [depth for feed in feeds for depth in feed.depths()],
            [feed.first for feed in feeds for _ in feed.token_ids],
            [feed.first + feed.position for feed in feeds for _ in feed.token_ids],
        )
        ids, rows, places, depths, first, bases = upload(parts, dtype=torch.long, device=device)
        slots = torch.arange(end, device=device)
        beyond = slots - bases[:, None]  # (N, slots): places in the feed, negative for the cache's
        if has_trees:
            trees = [f.parents if f.parents is None else tuple(f.parents) for f in feeds]
            lines = [_lines(*part, longest) for part in zip(trees, sizes, strict=True)]
            lines = torch.cat(lines).to(device)
            own = lines.gather(1, beyond.clamp(0, longest - 1)) & (beyond < longest)
        else:
            own = beyond <= places[:, None]
        seen = (slots >= first[:, None]) & torch.where(beyond < 0, True, own)
        is_even = len(feeds) == num_rows and min(sizes) == longest
        if is_even:
            by_row = seen.view(num_rows, longest, end)
            starts = first.view(num_rows, longest)[:, 0]
        else:
            by_row = seen.new_zeros(num_rows, longest, end)
            by_row[:, :, 0] = True  # a padded query must see a slot, or it is NaN
            by_row[rows, places] = seen
            starts = first.new_zeros(num_rows).index_put((rows,), first)
        positions = bases - first + depths
        return Ahead(
            ids[None],
            positions[None],
            rows,
            places,
            depths,
            bases + places,
            by_row,
            starts,
            is_even,
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, rules: Rules
    ) -> Tensor:
        """(1, h, N, d) queries over (R, h_kv, slots, d) keys and values -> (1, N, h, d)."""
        num_rows, longest, _ = self.seen.shape
        flat = query[0].transpose(0, 1)  # (N, h, d)
        if self.is_even:
            queries = flat.unflatten(0, (num_rows, longest))
        else:
            queries = flat.new_zeros(num_rows, longest, *flat.shape[1:])
            queries[self.rows, self.places] = flat
        mask, groups = self._mask(rules)[:, None], query.shape[1] // key.shape[1]
        queries = queries.transpose(1, 2)  # (R, h, n, d)
        if groups > 1 and rules.is_softmax:  # see dense_attention: the cache is read as it lies
            queries = queries.unflatten(1, (-1, groups)).flatten(2, 3)  # (R, h_kv, g * n, d)
            out = dense_attention(
                queries, key, value, mask.repeat(1, 1, groups, 1), scale=scale, rules=rules
            )
            out = out.unflatten(2, (groups, longest)).flatten(1, 2)
        else:
            out = dense_attention(queries, key, value, mask, scale=scale, rules=rules)
        out = out.transpose(1, 2)  # (R, n, h, d)
        out = out.flatten(0, 1) if self.is_even else out[self.rows, self.places]
        return out[None]

    def _mask(self, rules: Rules) -> Tensor:
        """(R, n, slots) what queries see within window and chunk; layers of a kind share it."""
        reach = (rules.window, rules.chunk)
        if reach == (None, None):
            return self.seen
        if reach not in self.masks:
            keys = torch.arange(self.seen.shape[2], device=self.seen.device) - self.first[:, None]
            keys[self.rows, self.slots] = self.positions[0]
            queries = keys.new_zeros(self.seen.shape[:2])
            queries[self.rows, self.places] = self.positions[0]
            near = sees(queries[:, :, None], keys[:, None], *reach)
            if not self.is_even:
                near[:, :, 0] |= self.seen[:, :, 1:].sum(-1) == 0  # padded queries
            self.masks[reach] = self.seen & near
        return self.masks[reach]
