"""The decode loop with guesses: rows go on at their own pace, several tokens in a forward.

    AheadDecoding(lookahead, model, prompts, owners, sampling, tokenizer).run(noise)

posttrain.rollouts.lookahead says why the tokens are those of posttrain.rollouts.generator. Which
guesses were right is decided on the host, which waits for the device once a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from posttrain.packed.ahead import Ahead, Feed
from posttrain.packed.batch import upload
from posttrain.rollouts.draft_length import Step
from posttrain.rollouts.drafts import MOST_AHEAD, Draft, Row
from posttrain.rollouts.generator import COMPACT_SHARE, Cache, Decoding
from posttrain.rollouts.sampling import Completion, Sampling, choose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.rollouts.lookahead import Lookahead


class AheadDecoding:
    """One batch of completions in the making, whose rows go on at their own pace."""

    def __init__(
        self,
        lookahead: Lookahead,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        owners: Sequence[int],
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.ours, self.model, self.sampling, self.tokenizer = lookahead, model, sampling, tokenizer
        self.prompts, self.owners = [tuple(prompt) for prompt in prompts], owners
        self.needs_hidden = any(drafter.needs_hidden for drafter in lookahead.drafters)
        self.needs_states = any(getattr(d, "needs_states", False) for d in lookahead.drafters)
        with _head_inputs(model, wanted=self.needs_hidden) as caught:
            plain = Decoding(
                model, prompts, owners, sampling, None, spare_slots=lookahead.spare_slots
            )
        self.device, self.stop_ids, self.logits = plain.device, plain.stop_ids, plain.logits
        self.cache, self.prompt_slots = AheadCache(plain.cache), plain.cache.slot
        self.lengths = plain.positions  # (R,) of the prompts, by row of the cache
        self.numbers = plain.rows  # (R,) of the rows of noise
        self.hidden = caught[-1][0][list(owners)] if caught else None  # (live rows, D)

    def run(self, noise: Tensor) -> list[Completion]:
        """Generate until every row has ended; noise: (R, max_tokens) numbers in [0, 1)."""
        drafters, controller, clock = self.ours.drafters, self.ours.controller, self.ours.clock
        begun = clock()
        for drafter in drafters:
            drafter.begin(list(dict.fromkeys(self.prompts)), self.sampling)
        controller.begin()
        (flat,) = upload((noise.flatten(),), dtype=noise.dtype, device=self.device)
        self.noise, uniforms = flat.view(noise.shape), noise.tolist()
        rows = [
            Row(number, self.prompts[owner], uniforms[number], number)
            for number, owner in enumerate(self.owners)
        ]
        chosen = self._choose(self.logits, self.numbers, torch.zeros_like(self.numbers))
        for row, token in zip(rows, zip(*chosen, strict=True), strict=True):
            self._extend(row, [token])
        live = self._live(rows, [0] * len(rows))
        if self.hidden is not None:  # of rows that did not end with their first token
            self.hidden = self.hidden[[row.number for row in live]]
        if self.needs_states:
            for row, state in zip(live, self.hidden, strict=True):
                row.states.append(state[None])
        controller.balance -= clock() - begun
        while live and controller.goes_on(len(live)):
            live = self._step(live)
        if live:
            self._hand_over(live)
        controller.end()
        for drafter in drafters:
            drafter.end(rows)
        return [
            Completion(r.ids, r.logps, r.sampler_logps, "stop" if r.is_stopped else "length")
            for r in rows
        ]

    def _step(self, rows: list[Row]) -> list[Row]:
        """Feed every row its next token and a draft; return the rows that go on."""
        clock = self.ours.clock
        begun = clock()
        self._compact(rows)
        drafts = self._drafts(rows)
        feeds = [self._feed(row, draft) for row, draft in zip(rows, drafts, strict=True)]
        ahead = Ahead.of(feeds, self.cache.num_rows, self.device)
        fed = clock()
        logits, hidden = self._forward(ahead)
        steps = ahead.positions[0] + 1 - self.lengths[ahead.rows]
        chosen = self._choose(logits, self.numbers[ahead.rows], steps)
        seconds, tokens = clock() - fed, list(zip(*chosen, strict=True))
        starts, step = [len(row.ids) for row in rows], Step(len(rows), len(tokens) - len(rows))
        step.seconds = seconds
        ends, moves, offset = [], [], 0
        for row, feed, draft in zip(rows, feeds, drafts, strict=True):
            own = tokens[offset : offset + len(feed.token_ids)]
            path, gained = self._accepted(draft, own, offset, step)
            step.emitted += self._extend(row, gained)
            moves += _moves(feed, path)
            if self.needs_states:
                row.states.append(hidden[[offset + place for place in path]])
            ends.append(offset + path[-1])
            offset += len(own)
        self.cache.move(moves, self.device)
        live = self._live(rows, starts)
        step.lead = _lead(live, rows)
        if hidden is not None:
            self.hidden = hidden[[ends[i] for i, row in enumerate(rows) if row.goes_on]]
        self.ours.count(step)
        step.other = clock() - begun - seconds
        self.ours.controller.learn(step)
        return live

    def _hand_over(self, rows: list[Row]) -> None:
        """Complete rows plainly, one token in a step."""
        from posttrain.rollouts.handover import Resumed

        controller, clock = self.ours.controller, self.ours.clock
        begun, before = clock(), sum(len(row.ids) for row in rows)
        plain = Resumed(self, rows)
        copied = clock()
        plain.complete()
        seconds = clock() - copied
        gained = sum(len(row.ids) for row in rows) - before
        controller.balance -= copied - begun
        controller.earn(gained, plain.num_steps, seconds)

    def _drafts(self, rows: list[Row]) -> list[Draft]:
        """The guesses of each row that are worth verifying."""
        controller = self.ours.controller
        found = [d.propose(rows, MOST_AHEAD, self.hidden) for d in self.ours.drafters]
        best = found[0]
        if len(found) > 1:
            options = zip(*found, strict=True)
            best = [max(mine, key=lambda draft: sum(controller.chances(draft))) for mine in options]
        return controller.chosen(best, len(rows))

    def _feed(self, row: Row, draft: Draft) -> Feed:
        position = len(row.prompt) + len(row.ids) - 1
        ids = [row.ids[-1], *draft.token_ids]
        return Feed(row.place, self.prompt_slots - len(row.prompt), position, ids, draft.parents)

    def _forward(self, ahead: Ahead) -> tuple[Tensor, Tensor | None]:
        """(N, V) logits, and (N, D) states before the head if heads draft."""
        self.cache.ahead = ahead
        with _head_inputs(self.model, wanted=self.needs_hidden) as caught:
            output = self.model(
                input_ids=ahead.input_ids,
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device),
                position_ids=ahead.positions,
                past_key_values=self.cache,
                packed=ahead,
            )
        return output.logits[0], caught[-1][0] if caught else None

    def _choose(self, logits: Tensor, numbers: Tensor, steps: Tensor) -> list[list]:
        """Tokens, their log-probs by the policy and by the sampling distribution, on the host."""
        uniform = self.noise[numbers, steps]
        token, logps = choose(logits, uniform, self.sampling, self.stop_ids, steps)
        return [token.tolist(), *logps.tolist()]

    def _accepted(
        self,
        draft: Draft,
        own: Sequence[tuple],
        offset: int,  # noqa: ARG002
        step: Step,
    ) -> tuple[list[int], list[tuple]]:
        """Find the places of a row's feed up to which its guesses are right, and what it gains.

        own: the token after each place, with its log-probs. offset: of the feed in the forward.
        """
        path, right = [0], [token for token, *_ in own]
        for index, (token, kind) in enumerate(zip(draft.token_ids, draft.kinds, strict=True)):
            parent = draft.parent(index)
            if parent not in path:
                continue
            is_right = token == right[parent]
            step.verified.append((kind, path.index(parent) + 1, is_right))
            if is_right:
                path.append(index + 1)
        return path, [own[place] for place in path]

    def _extend(self, row: Row, tokens: Sequence[tuple[int, float, float]]) -> int:
        """Add tokens with their log-probs up to a stop; return how many."""
        row.steps += 1
        before = len(row.ids)
        for token, logp, sampler_logp in tokens:
            row.ids.append(token)
            row.logps.append(logp)
            row.sampler_logps.append(sampler_logp)
            if token in self.sampling.stop_ids:
                row.is_stopped = True
                break
        return len(row.ids) - before

    def _live(self, rows: list[Row], starts: Sequence[int]) -> list[Row]:
        """End rows by stop strings, searched from `starts` on, and return those that go on."""
        if self.sampling.stop_strings:
            searched = [(row.ids, start) for row, start in zip(rows, starts, strict=True)]
            for row, end in zip(
                rows, self.sampling.string_ends(searched, self.tokenizer), strict=True
            ):
                if end:
                    row.is_stopped = True
                    for numbers in (row.ids, row.logps, row.sampler_logps):
                        del numbers[end:]
        return [row for row in rows if row.goes_on]

    def _compact(self, live: list[Row]) -> None:
        """Let ended rows leave the cache once they are a share of it."""
        if len(live) > (1 - COMPACT_SHARE) * self.cache.num_rows:
            return
        (places,) = upload(([r.place for r in live],), dtype=torch.long, device=self.device)
        end = self.prompt_slots + max(len(row.ids) for row in live)
        self.cache.select(places, end)
        self.lengths, self.numbers = self.lengths[places], self.numbers[places]
        for place, row in enumerate(live):
            row.place = place


class AheadCache:
    """Keys and values of rows that are fed unequal numbers of tokens, beyond the prompts' slots."""

    def __init__(self, cache: Cache) -> None:
        self.keys, self.values = cache.keys, cache.values
        for state in (*self.keys, *self.values):
            state[:, :, cache.slot :] = 0  # what is not written yet is masked, and must be finite
        self.ahead: Ahead | None = None

    @property
    def num_rows(self) -> int:
        """Rows, ended ones among them."""
        return len(self.keys[0])

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Keep a layer's (1, h, N, d) new keys and values; return (R, h, slots, d) of all rows."""
        rows, slots, end = self.ahead.rows, self.ahead.slots, self.ahead.seen.shape[2]
        for kept, new in ((self.keys[layer], key), (self.values[layer], value)):
            kept[rows, :, slots] = new[0].transpose(0, 1).to(kept.dtype)  # a CPU's is float32
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def move(self, moves: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        """Copy slots: (row, from, to) of the right guesses that do not lie behind each other."""
        if not moves:
            return
        rows, old, new = upload(tuple(zip(*moves, strict=True)), dtype=torch.long, device=device)
        for state in (*self.keys, *self.values):
            state[rows, :, new] = state[rows, :, old]

    def select(self, rows: Tensor, end: int) -> None:
        """Move these rows, in ascending order, to the front; no memory is asked for anew."""
        for states in (self.keys, self.values):
            for layer, state in enumerate(states):
                states[layer] = state[: len(rows)]
                states[layer][:, :, :end] = state[rows, :, :end]


def _moves(feed: Feed, path: Sequence[int]) -> list[tuple[int, int, int]]:
    base = feed.first + feed.position
    return [(feed.row, base + old, base + new) for new, old in enumerate(path) if old != new]


def _lead(live: Sequence[Row], rows: Sequence[Row]) -> int:
    """Forwards that the batch is certainly spared: its slowest row's, at the end its longest's."""
    if live:
        return min(len(row.ids) - row.steps for row in live)
    return max(len(row.ids) - row.steps for row in rows)


@contextmanager
def _head_inputs(model: nn.Module, *, wanted: bool) -> Iterator[list[Tensor]]:
    """Yield a list that gets the (1, N, D) states that the LM head is given inside."""
    caught: list[Tensor] = []
    if not wanted:
        yield caught
        return
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    try:
        yield caught
    finally:
        hook.remove()
