"""Generation by a model's own cache, or none, where the decode loop's cache does not serve.

    completions = OwnCacheGenerator(model, tokenizer).generate(prompts, sampling, seeds=seeds)

transformers' `generate` runs the model; which token comes next, its log-prob and where a completion
ends are decided as in posttrain.rollouts.generator. Prompts are computed once for each completion,
and those of different lengths one batch after the other: padding on the left is not exact in every
family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.packed.batch import Segment, pack
from posttrain.packed.forward import in_evaluation, packed_inputs
from posttrain.rollouts.sampling import Completion, Sampling, choose, completions_of, uniforms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from posttrain.rollouts.routing import RoutingRecorder


class OwnCacheGenerator:
    """Completes prompts with a causal LM as transformers' `generate` runs it.

    Args:
        tokenizer: needed for stop strings alone.
        rows_at_once: completions generated together, at most.
        use_cache: False computes each sequence anew for every token, where a family's cache does
            not give the same numbers.
        record: of the model's routers, where completions are to have their experts.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        rows_at_once: int,
        *,
        use_cache: bool,
        record: RoutingRecorder | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.rows_at_once, self.use_cache, self.record = rows_at_once, use_cache, record

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int,
        seeds: Sequence[int],
        images: Sequence[Sequence[Mapping] | None] | None = None,
    ) -> list[list[Completion]]:
        """See posttrain.rollouts.sampling.Generator; images: those of each prompt."""
        vision = getattr(self.model, "vision_inputs", None)
        if vision is None and any(images or ()):
            raise ConfigError(
                "the prompts have images, and the model was loaded as a model of text. Load it "
                "with load_model(config, images=True)."
            )
        if vision is not None:
            sampling = replace(sampling, never=tuple(vision.placeholders))
        images = images or [()] * len(prompts)
        noise = uniforms(seeds, num_generations, sampling.max_tokens)
        rows = range(len(noise))
        by_length: dict[int, list[int]] = {}
        for row in rows:
            by_length.setdefault(len(prompts[row // num_generations]), []).append(row)
        found: dict[int, Completion] = {}
        for same in by_length.values():
            for start in range(0, len(same), self.rows_at_once):
                part = same[start : start + self.rows_at_once]
                owners = [row // num_generations for row in part]
                ids, seen = [list(prompts[i]) for i in owners], [images[i] or () for i in owners]
                with in_evaluation(self.model):
                    done = self._complete(ids, seen, sampling, noise[part])
                if self.record:
                    done = self.record.given_to_rows(done, len(ids[0]))
                found |= dict(zip(part, done, strict=True))
        return [
            [found[row] for row in rows[i : i + num_generations]]
            for i in range(0, len(rows), num_generations)
        ]

    def _complete(
        self,
        prompts: list[list[int]],
        images: list[Sequence[Mapping]],
        sampling: Sampling,
        noise: Tensor,
    ) -> list[Completion]:
        """Complete prompts of one length, one row each."""
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor(prompts, device=device)
        course = _Course(sampling, noise.to(device), self.tokenizer)
        if not self.use_cache:
            self._recompute(prompts, images, course)
            return course.completions()
        bare = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        vision = getattr(bare, "vision_inputs", None)
        seen = {} if vision is None else vision.of_rows(bare, ids, images)
        with _plain_generation(self.model):
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **seen,
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                use_cache=True,
                synced_gpus=False,  # the weights are whole here; ranks go on by themselves
                logits_processor=[course.choose],
                stopping_criteria=[course.has_ended],
            )
        return course.completions()

    def _recompute(
        self, prompts: list[list[int]], images: list[Sequence[Mapping]], course: _Course
    ) -> None:
        """Compute every sequence anew for each of its tokens."""
        sequences = [list(prompt) for prompt in prompts]
        device = self.model.get_input_embeddings().weight.device
        for _ in range(course.sampling.max_tokens):
            if self.record:
                self.record.forwards.clear()  # all of it comes again
            rows = zip(sequences, images, strict=True)
            batch = pack([Segment(i, images=x) for i, x in rows], num_rows=0, device=device)
            output = self.model(**packed_inputs(batch), logits_to_keep=batch.segment_ends)
            course.choose(None, output.logits[0])
            if course.has_ended(None, None).all():
                break
            for ids, token in zip(sequences, course.tokens[-1].tolist(), strict=True):
                ids.append(token)


class _Course:
    """Chooses the tokens of R rows one after the other, and remembers them and their log-probs."""

    def __init__(
        self,
        sampling: Sampling,
        noise: Tensor,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.sampling, self.noise, self.tokenizer = sampling, noise, tokenizer
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=noise.device)
        self.tokens: list[Tensor] = []  # (R,) each
        self.logps: list[Tensor] = []  # (2, R) each: the policy's, the sampling distribution's
        self.lengths = torch.zeros(len(noise), dtype=torch.long, device=noise.device)  # 0: alive

    def choose(self, _ids: Tensor | None, logits: Tensor) -> Tensor:
        """Logits after which taking the most likely token takes the chosen one."""
        step = len(self.tokens)
        token, logps = choose(logits, self.noise[:, step], self.sampling, self.stop_ids, step)
        self.tokens.append(token)
        self.logps.append(logps)
        return torch.full_like(logits, -torch.inf).scatter(1, token[:, None], 0.0)

    def has_ended(self, _ids: Tensor | None, _scores: Any, **_: Any) -> Tensor:
        """(R,) True where a completion has ended."""
        length = len(self.tokens)
        ended = (self.tokens[-1][:, None] == self.stop_ids).any(1)
        if self.sampling.stop_strings:
            ended |= self._has_stop_string()
        self.lengths = torch.where((self.lengths == 0) & ended, length, self.lengths)
        return self.lengths > 0

    def _has_stop_string(self) -> Tensor:
        strings = self.sampling.stop_strings
        longest = max(len(string.encode()) for string in strings)  # a token holds a byte at least
        tails = torch.stack(self.tokens[-longest:], 1).tolist()
        texts = self.tokenizer.batch_decode(tails)
        found = [any(string in text for string in strings) for text in texts]
        return torch.tensor(found, device=self.noise.device)

    def completions(self) -> list[Completion]:
        """Return what was sampled, each row up to its end."""
        tokens, stopped = torch.stack(self.tokens, 1), self.lengths > 0
        lengths = torch.where(stopped, self.lengths, tokens.shape[1])
        return completions_of(tokens, torch.stack(self.logps, -1), lengths, stopped)


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """Inside, the model's own generation settings (penalties, forced tokens …) are not used."""
    from transformers import GenerationConfig

    places = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    own = [place.generation_config for place in places]
    for place in places:
        place.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for place, settings in zip(places, own, strict=True):
            place.generation_config = settings
