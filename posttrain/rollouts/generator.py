"""A decode loop on the Hugging Face model that is being trained.

Each prompt is computed once, packed, however many answers it gets. Rows whose answer has ended
leave the batch. The log-prob of each drawn token comes with it, at the sampling temperature, from
the same weights, attention and softmax as the training forward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.packed.batch import PackedBatch, Segment, pack
from posttrain.rollouts.sampling import Completion, Sampling, draw, restrict, uniforms

# Rows leave the batch together once they are this share of it: leaving copies the cache.
COMPACT_SHARE = 0.1
# Answers drawn together: bounds the cache, whatever the batch.
ROWS_AT_ONCE = 256


class _Cache:
    """Keys and values of R rows: padded prompt on the left, answer slots on the right.

    The model calls `update` in each layer. During the packed pass over the prompts it keeps the
    prompts' keys and values; afterwards it writes one slot a step.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # per layer; packed (1, h, N, d), then (R, h, slots, d)
        self.values: list[Tensor] = []
        self.slot = -1  # -1 during the packed pass

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        key = key.to(value.dtype)  # autocast leaves rotary outputs in float32
        if self.slot < 0:
            self.keys.append(key)
            self.values.append(value)
            return key, value
        self.keys[layer][:, :, self.slot] = key[:, :, 0]
        self.values[layer][:, :, self.slot] = value[:, :, 0]
        end = self.slot + 1
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def spread(self, index: Tensor, num_slots: int) -> None:
        """From packed to rows: index (R, prompt slots) of packed positions."""
        self.slot = index.shape[1]
        for states in (self.keys, self.values):
            for layer, packed in enumerate(states):
                rows = packed.new_empty(len(index), packed.shape[1], num_slots, packed.shape[3])
                rows[:, :, : index.shape[1]] = packed[0][:, index].transpose(0, 1)
                states[layer] = rows

    def select(self, rows: Tensor) -> None:
        """These rows, in ascending order, move to the front; no memory is asked for anew."""
        for states in (self.keys, self.values):
            for layer, state in enumerate(states):
                states[layer] = state[: len(rows)]
                states[layer][:, :, : self.slot] = state[rows, :, : self.slot]


class HFGenerator:
    """Answers prompts with `model`, a causal LM that posttrain.packed.prepare has made ready.

    tokenizer: needed for stop strings alone. rows_at_once: answers drawn together; it bounds the
    memory of keys and values.
    """

    def __init__(
        self, model: nn.Module, *, tokenizer: Any = None, rows_at_once: int = ROWS_AT_ONCE
    ) -> None:
        self.model, self.tokenizer, self.rows_at_once = model, tokenizer, rows_at_once

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int = 1,
        *,
        seeds: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """`num_generations` answers to each prompt; see posttrain.rollouts.sampling."""
        if sampling.stop_strings and self.tokenizer is None:
            raise ConfigError("sampling: stop strings need HFGenerator(model, tokenizer=…).")
        training = self.model.training
        self.model.eval()
        seeds = range(len(prompts)) if seeds is None else seeds
        completions: list[Completion] = []
        size = max(1, self.rows_at_once // num_generations)  # answers do not depend on it
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            noise = uniforms(seeds[part], num_generations, sampling.max_tokens)
            decoding = _Decoding(
                self.model, prompts[part], sampling, num_generations, self.tokenizer
            )
            completions += decoding.run(noise)
        self.model.train(training)
        step = num_generations
        return [completions[i : i + step] for i in range(0, len(completions), step)]


class _Decoding:
    """One batch of answers in the making; row r answers prompt r // num_generations."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int,
        tokenizer: Any,
    ) -> None:
        self.model, self.sampling, self.tokenizer = model, sampling, tokenizer
        self.device = model.get_input_embeddings().weight.device
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=self.device)
        batch = pack([Segment(p) for p in prompts], num_rows=0, device=self.device)
        self.cache = _Cache()
        self.logits = self._prefill(batch).repeat_interleave(num_generations, 0)  # (R, V)
        self._spread(batch, num_generations)
        self.rows = torch.arange(len(self.logits), device=self.device)  # still being answered
        self.alive = torch.ones_like(self.rows, dtype=torch.bool)

    def _prefill(self, batch: PackedBatch) -> Tensor:
        """(P, V) logits after each prompt, filling the cache."""
        layout = batch.layout
        last = [s + n - 1 for s, n in zip(layout.starts, layout.lengths, strict=True)]
        output = self.model(
            input_ids=batch.input_ids,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device),
            position_ids=batch.position_ids,
            past_key_values=self.cache,
            packed=layout,
            logits_to_keep=torch.tensor(last, device=self.device),
        )
        return output.logits[0]

    def _spread(self, batch: PackedBatch, num_generations: int) -> None:
        """Give each answer its row: its prompt right-aligned, then slots for its tokens."""
        layout = batch.layout
        longest = max(layout.lengths)
        index = torch.zeros(len(layout.starts), longest, dtype=torch.long)
        visible = torch.zeros(len(layout.starts), longest, dtype=torch.bool)
        for row, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
            index[row, longest - length :] = torch.arange(start, start + length)
            visible[row, longest - length :] = True
        index = index.repeat_interleave(num_generations, 0).to(self.device)
        visible = visible.repeat_interleave(num_generations, 0).to(self.device)
        answer = visible.new_ones(len(visible), self.sampling.max_tokens)
        self.visible = torch.cat((visible, answer), 1)  # (R, slots)
        self.positions = visible.sum(1)  # (R,) position of the next token
        self.cache.spread(index, self.visible.shape[1])

    def run(self, noise: Tensor) -> list[Completion]:
        num_rows, max_tokens = noise.shape
        noise = noise.to(self.device)
        tokens = torch.zeros(num_rows, max_tokens, dtype=torch.long, device=self.device)
        logps = torch.zeros(2, num_rows, max_tokens, device=self.device)
        lengths = torch.full((num_rows,), max_tokens, device=self.device)
        stopped = torch.zeros(num_rows, dtype=torch.bool, device=self.device)
        for step in range(max_tokens):
            token, logp = self._choose(noise[self.rows, step], step)
            tokens[self.rows, step], logps[:, self.rows, step] = token, logp
            stops = torch.isin(token, self.stop_ids) & self.alive
            if self.sampling.stop_strings:
                stops |= self._completes_string(tokens[self.rows, : step + 1]) & self.alive
            lengths[self.rows[stops]], stopped[self.rows[stops]] = step + 1, True
            self.alive &= ~stops
            if step + 1 == max_tokens or not self._compact():
                break
            self._advance(tokens[self.rows, step])
        return _completions(tokens, logps, lengths, stopped)

    def _choose(self, uniform: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(R,) tokens; (2, R) their log-probs, the policy's and those they were drawn with."""
        sampling = self.sampling
        log_probs = (self.logits.float() / (sampling.temperature or 1.0)).log_softmax(-1)
        allowed = log_probs
        if step < sampling.min_tokens:
            allowed = log_probs.index_fill(1, self.stop_ids, -torch.inf).log_softmax(-1)
        allowed = restrict(allowed, top_k=sampling.top_k, top_p=sampling.top_p)
        token = draw(allowed, uniform) if sampling.temperature else allowed.argmax(-1)
        own = log_probs.gather(-1, token[:, None]).squeeze(-1)
        drawn = own if allowed is log_probs else allowed.gather(-1, token[:, None]).squeeze(-1)
        return token, torch.stack((own, drawn))

    def _completes_string(self, answers: Tensor) -> Tensor:
        """(R,) whether the last tokens of (R, T) answers, as text, hold a stop string."""
        strings = self.sampling.stop_strings
        longest = max(len(string.encode()) for string in strings)  # a token holds a byte at least
        tails = self.tokenizer.batch_decode(answers[:, -longest:].tolist())
        found = [any(string in tail for string in strings) for tail in tails]
        return torch.tensor(found, device=self.device)

    def _compact(self) -> bool:
        """Let ended rows leave; False when none is left."""
        num_alive = int(self.alive.sum())
        if num_alive and num_alive > (1 - COMPACT_SHARE) * len(self.rows):
            return True
        keep = self.alive.nonzero().squeeze(1)
        self.rows, self.alive = self.rows[keep], self.alive[keep]
        self.visible, self.positions = self.visible[keep], self.positions[keep]
        self.cache.select(keep)
        return num_alive > 0

    def _advance(self, token: Tensor) -> None:
        """One token further in every row."""
        mask = self.visible[:, None, None, : self.cache.slot + 1]
        output = self.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
        )
        self.logits = output.logits[:, -1]
        self.positions = self.positions + 1
        self.cache.slot += 1


def _completions(
    tokens: Tensor, logps: Tensor, lengths: Tensor, stopped: Tensor
) -> list[Completion]:
    columns = (tokens, *logps, lengths, stopped)
    return [
        Completion(ids[:length], own[:length], drawn[:length], "stop" if ended else "length")
        for ids, own, drawn, length, ended in zip(*(c.tolist() for c in columns), strict=True)
    ]
