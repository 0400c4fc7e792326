"""A decode loop on the Hugging Face model that is being trained.

    generator = HFGenerator(model, tokenizer=tokenizer)
    completions = generator.generate(prompts, sampling, num_generations=4, seeds=seeds)

Each prompt is computed once, packed, however many completions it gets. Rows whose completion has
ended leave the batch. Each sampled token's log-prob comes with it, at the sampling temperature,
from the weights, attention and softmax of the training forward.

Left out: paged memory, CUDA graphs; posttrain.rollouts.vllm has them, and is held against this
loop. posttrain.rollouts.lookahead adds speculation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.packed.batch import PackedBatch, Segment, pack, pack_groups, upload
from posttrain.packed.forward import (
    Step,
    attempted,
    check_context,
    computes_rows,
    heads_of,
    in_evaluation,
    packed_inputs,
    packed_logps,
)
from posttrain.packed.half import fixed_weights
from posttrain.packed.kernels import dtype_of_cache, right_aligned
from posttrain.packed.prepare import probe_ids
from posttrain.rollouts.own_cache import OwnCacheGenerator
from posttrain.rollouts.sampling import Completion, Sampling, choose, completions_of, uniforms
from posttrain.run.options import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.rollouts.lookahead import Lookahead
    from posttrain.rollouts.routing import RoutingRecorder

COMPACT_SHARE = 0.1  # of the batch, from which rows leave it: leaving copies the cache
ROWS_AT_ONCE = 256  # completions: larger batches are no faster, and score later
CACHE_BYTES = 8 << 30  # of their keys and values
TOKENS_PER_LOOK_CUDA, TOKENS_PER_LOOK = 8, 1  # at which rows have ended: a look waits for a GPU


class HFGenerator:
    """Completes prompts with `model`, a causal LM that posttrain.packed.forward has made ready.

    Args:
        tokenizer: needed for stop strings alone.
        rows_at_once: completions generated together, at most.
        cache_bytes: bound of their keys and values, for prompts and max_tokens of any length.
            Counted in the dtype of the model's embeddings, so autocast stays at half of it.
        record_routing: give each completion the experts of its tokens (posttrain.packed.replay).
        lookahead: guesses tokens and verifies several in one forward; None: one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rows_at_once: int = ROWS_AT_ONCE,
        cache_bytes: int = CACHE_BYTES,
        record_routing: bool = False,
        lookahead: Lookahead | None = None,
    ) -> None:
        self.model, self.tokenizer, self.record_routing = model, tokenizer, record_routing
        self.lookahead = lookahead
        self.rows_at_once, self.cache_bytes = rows_at_once, cache_bytes

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        images: Sequence[Sequence[Mapping] | None] | None = None,
    ) -> list[list[Completion]]:
        """Generate `num_generations` completions of each prompt; see posttrain.rollouts.sampling.

        seeds: one for each prompt, by default its place. A completion depends on its prompt, its
        seed and its number alone, not on what is generated beside it. images: of each prompt.
        """
        if sampling.stop_strings and self.tokenizer is None:
            raise ConfigError("sampling: stop strings need HFGenerator(model, tokenizer=…).")
        if not prompts:
            return []
        seeds = range(len(prompts)) if seeds is None else seeds
        longest = max(map(len, prompts)) + sampling.max_tokens
        spare = self.lookahead.spare_slots if self.lookahead else 0
        check_context(self.model, longest, "Lower --max_completion_length, or shorten the prompts.")
        if (way := way_to_generate(self.model)) != "loop" or any(images or ()):
            if self.lookahead:
                self.lookahead.refuse(self.model, "its completions come from its own cache")
            own = partial(OwnCacheGenerator, self.model, self.tokenizer, self.rows_at_once)
            with self._recording() as record:
                own = own(use_cache=way == "cache", record=record)
                return own.generate(prompts, sampling, num_generations, seeds, images)
        completions: list[Completion] = []
        fixed = fixed_weights(self.model)
        with in_evaluation(self.model), fixed, self._recording() as record:
            for rows in self._parts(prompts, sampling.max_tokens + spare, num_generations):
                first, last = rows[0] // num_generations, rows[-1] // num_generations + 1
                noise = uniforms(seeds[first:last], num_generations, sampling.max_tokens)
                noise = noise[rows.start - first * num_generations :][: len(rows)]
                owners = [row // num_generations - first for row in rows]
                parts = (prompts[first:last], owners, sampling, self.tokenizer, record)
                if self.lookahead:
                    completions += self.lookahead.complete(self.model, *parts, noise)
                else:
                    completions += Decoding(self.model, *parts).run(noise)
        step = num_generations
        return [completions[i : i + step] for i in range(0, len(completions), step)]

    def _recording(self) -> AbstractContextManager:
        if not self.record_routing:
            return nullcontext()
        from posttrain.rollouts.routing import RoutingRecorder

        return RoutingRecorder(self.model)

    def _parts(
        self, prompts: Sequence[Sequence[int]], num_slots: int, num_generations: int
    ) -> Iterator[range]:
        """Rows that are generated together, row r completing prompt r // num_generations.

        Whole prompts while they fit; a prompt whose completions do not fit together alone is cut.
        """
        start, total = 0, len(prompts) * num_generations
        while start < total:
            stop = start
            longest = len(prompts[start // num_generations])
            most = self._most_rows(longest + num_slots)
            while stop < total:
                index = stop // num_generations
                longest = max(longest, len(prompts[index]))
                end = (index + 1) * num_generations
                if end - start > self._most_rows(longest + num_slots):
                    break
                stop = end
            if stop == start:
                stop = min(start + most, (start // num_generations + 1) * num_generations)
            yield range(start, stop)
            start = stop

    def _most_rows(self, num_slots: int) -> int:
        """Completions that may share a cache of this many slots for each."""
        config, heads = self.model.config.get_text_config(), heads_of(self.model)
        size = self.model.get_input_embeddings().weight.element_size()
        per_slot = 2 * config.num_hidden_layers * heads["num_kv_heads"] * heads["head_dim"] * size
        return max(1, min(self.rows_at_once, self.cache_bytes // (per_slot * num_slots)))


class Cache:
    """Keys and values of R rows: padded prompt on the left, slots of the completion on the right.

    The model calls `update` in each layer. During the packed pass over the prompts it keeps the
    prompts' keys and values; afterwards it writes one slot a step.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # per layer; packed (1, h, N, d), then (R, h, slots, d)
        self.values: list[Tensor] = []
        self.slot = -1  # -1 during the packed pass

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values, and return all that its queries see."""
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
        """Turn the packed cache into rows. index: (R, prompt slots) of packed positions."""
        self.slot = index.shape[1]
        for states in (self.keys, self.values):
            for layer, packed in enumerate(states):
                size = (len(index), packed.shape[1], num_slots, packed.shape[3])
                rows = packed.new_empty(size, dtype=dtype_of_cache(packed))
                rows[:, :, : index.shape[1]] = packed[0][:, index].transpose(0, 1)
                states[layer] = rows

    def select(self, rows: Tensor) -> None:
        """Move these rows, in ascending order, to the front; no memory is asked for anew."""
        for states in (self.keys, self.values):
            for layer, state in enumerate(states):
                states[layer] = state[: len(rows)]
                states[layer][:, :, : self.slot] = state[rows, :, : self.slot]


class Decoding:
    """One batch of R completions in the making; row r completes prompts[owners[r]].

    Nothing in the loop over tokens depends on a number that only the device knows: rows that have
    ended go on being computed, and what they sample is thrown away, until the next look.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        owners: Sequence[int],
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase | None,
        record: RoutingRecorder | None = None,
        spare_slots: int = 0,
    ) -> None:
        self.model, self.sampling, self.tokenizer, self.record = model, sampling, tokenizer, record
        self.device = model.get_input_embeddings().weight.device
        batch = pack([Segment(p) for p in prompts], num_rows=0, device=self.device)
        lengths, slots = batch.layout.lengths, right_aligned(batch.layout)
        parts = (owners, sampling.stop_ids, lengths, slots.flatten())
        owner, self.stop_ids, lengths, index = upload(parts, dtype=torch.long, device=self.device)
        self.cache = Cache()
        self.logits = self._prefill(batch)[owner]  # (P, V) -> (R, V)
        self.positions = lengths[owner]  # (R,) position of the next token
        # (R, slots): a prompt's tokens lie at the end of the slots for prompts.
        num_slots = slots.shape[1] + sampling.max_tokens + spare_slots
        self.first = slots.shape[1] - self.positions  # (R,) slot of a row's first token
        self.visible = torch.arange(num_slots, device=self.device) >= self.first[:, None]
        self.cache.spread(index.view_as(slots)[owner], num_slots)
        self.rows = torch.arange(len(owners), device=self.device)  # that are still in the batch
        self.alive = torch.ones_like(self.rows, dtype=torch.bool)
        if record:
            record.begin(batch.layout.lengths, owners, sampling.max_tokens)

    def _prefill(self, batch: PackedBatch) -> Tensor:
        """(P, V) logits after each prompt, filling the cache."""
        inputs = packed_inputs(batch)
        del inputs["use_cache"]
        output = self.model(**inputs, past_key_values=self.cache, logits_to_keep=batch.segment_ends)
        return output.logits[0]

    def run(self, noise: Tensor) -> list[Completion]:
        """Generate until every row has ended; noise: (R, max_tokens) numbers in [0, 1)."""
        num_rows, max_tokens = noise.shape
        (flat,) = upload((noise.flatten(),), dtype=noise.dtype, device=self.device)
        noise = flat.view(num_rows, max_tokens)
        tokens = torch.zeros(num_rows, max_tokens, dtype=torch.long, device=self.device)
        logps = torch.zeros(2, num_rows, max_tokens, device=self.device)
        self.lengths = torch.full((num_rows,), max_tokens, device=self.device)
        self.stopped = torch.zeros(num_rows, dtype=torch.bool, device=self.device)
        every = TOKENS_PER_LOOK_CUDA if self.device.type == "cuda" else TOKENS_PER_LOOK
        looked = 0  # tokens that stop strings have been searched in
        for step in range(max_tokens):
            uniform = noise[self.rows, step]
            where = self.stop_ids, self._place(step)
            token, logp = choose(self.logits, uniform, self.sampling, *where)
            tokens[self.rows, step], logps[:, self.rows, step] = token, logp
            self._end((token[:, None] == self.stop_ids).any(1), step + 1)
            is_last = step + 1 == max_tokens
            if is_last or (step + 1) % every == 0:
                if self.sampling.stop_strings:
                    self._search_strings(tokens[self.rows, : step + 1], looked)
                looked = step + 1
                if is_last or not self._compact():
                    break
            self._advance(tokens[self.rows, step])
            if self.record:
                self.record.keep(self.rows, step)
        completions = completions_of(tokens, logps, self.lengths, self.stopped)
        return self.record.given_to(completions) if self.record else completions

    def _place(self, step: int) -> int | Tensor:
        return step

    def _end(self, ends: Tensor, length: int) -> None:
        """Rows of the batch where `ends` is true, and that have not ended yet, have this length."""
        ends = ends & self.alive
        lengths, stopped = self.lengths[self.rows], self.stopped[self.rows]
        self.lengths[self.rows] = torch.where(ends, length, lengths)
        self.stopped[self.rows] = stopped | ends
        self.alive = self.alive & ~ends

    def _search_strings(self, tokens: Tensor, start: int) -> None:
        """End each row with the first token from `start` on that completes a stop string.

        tokens: (R, T) of the rows in the batch. A row that has met a stop token since `start` may
        have completed a string before: then it ends there.
        """
        lengths = self.lengths[self.rows, None].clamp(max=tokens.shape[1])
        read = torch.cat((lengths, tokens), 1).tolist()  # one wait for both
        rows = [(ids[1 : 1 + ids[0]], start) for ids in read]
        self._end_strings(self.sampling.string_ends(rows, self.tokenizer))

    def _end_strings(self, ends: Sequence[int]) -> None:
        (ended,) = upload((ends,), dtype=torch.long, device=self.device)
        found = ended > 0
        self.lengths[self.rows] = torch.where(found, ended, self.lengths[self.rows])
        self.stopped[self.rows] |= found
        self.alive &= ~found

    def _compact(self) -> bool:
        """Let ended rows leave the batch; returns False when none is left."""
        alive = self.alive.tolist()  # the one wait between two looks
        keep = [row for row, is_alive in enumerate(alive) if is_alive]
        if not keep or len(keep) > (1 - COMPACT_SHARE) * len(alive):
            return bool(keep)
        (rows,) = upload((keep,), dtype=torch.long, device=self.device)
        self.rows, self.alive = self.rows[rows], self.alive[rows]
        self.visible, self.positions = self.visible[rows], self.positions[rows]
        self.logits, self.first = self.logits[rows], self.first[rows]
        self.cache.select(rows)
        return True

    def _advance(self, token: Tensor) -> None:
        """Run the model one token further in every row."""
        mask = self.visible[:, None, None, : self.cache.slot + 1]
        output = self.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            packed=Step(self.first),
        )
        self.logits = output.logits[:, -1]
        self.positions = self.positions + 1
        self.cache.slot += 1


# The ways to generate, from the fastest: this loop; the model's own cache; no cache at all.
PROBE_TOKENS = 6
# Nats by which sampling and training may differ; half precision: root mean square (SmolLM2: 0.06)
PROBE_TOLERANCE, PROBE_TOLERANCE_HALF = 1e-4, 0.1


def way_to_generate(model: nn.Module) -> str:
    """Return `loop`, `cache` or `no cache`: the first whose log-probs are a training forward's.

    Tried once a model, with a prompt beyond every window of its config. Raises ConfigError if none
    is.
    """
    if getattr(model, "generates_by", None) is None:
        ways = ("cache", "no cache") if computes_rows(model) else ("loop", "cache", "no cache")
        with in_evaluation(model):
            model.generates_by = next((way for way in ways if _agrees(model, way)), None)
        if model.generates_by not in ("loop", None):
            say(f"sampling by transformers' generate, {model.generates_by}: see docs/models.md")
    if model.generates_by is None:
        raise ConfigError(
            f"{type(model).__name__} can be trained but not sampled from: the log-probs of its "
            "tokens in generation are not those of a forward of the whole sequence."
        )
    return model.generates_by


def _agrees(model: nn.Module, way: str) -> bool:
    prompt, images = probe_ids(model)[0], ()
    if getattr(model, "vision_inputs", None) is not None:
        from posttrain.packed.vision import probe_prompt

        prompt, images = probe_prompt(model, prompt)
    ask = partial(_probe_completions, model, way, prompt, Sampling(PROBE_TOKENS, ()), images)
    completions, raised = attempted(ask)
    if raised:
        return False
    sampled = torch.tensor([logp for completion in completions for logp in completion.logps])
    answers, is_half = [completion.token_ids for completion in completions], []
    weight = model.get_input_embeddings().weight

    def look(*_: object) -> None:
        is_half.append(torch.is_autocast_enabled(weight.device.type) or weight.element_size() < 4)

    hook = model.get_output_embeddings().register_forward_pre_hook(look)  # inside any autocast
    try:
        batch = pack_groups([prompt], [answers], device=weight.device, images=[images])
        trained = packed_logps(model, batch).logps.cpu()
    finally:
        hook.remove()
    squares, half = (trained - sampled).square(), any(is_half)
    gap = (squares.mean() if half else squares.max()).sqrt().item()
    return gap <= (PROBE_TOLERANCE_HALF if half else PROBE_TOLERANCE)


def _probe_completions(
    model: nn.Module, way: str, prompt: list[int], sampling: Sampling, images: Sequence[Mapping]
) -> list[Completion]:
    if way == "loop":
        decoding = Decoding(model, [prompt], [0, 0], sampling, None)
        return decoding.run(torch.tensor([[0.2], [0.7]]).expand(2, PROBE_TOKENS))
    generator = OwnCacheGenerator(model, None, 2, use_cache=way == "cache")
    return generator.generate([prompt], sampling, 2, [0], [images])[0]
