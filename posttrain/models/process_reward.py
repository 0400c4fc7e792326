"""A process reward model in use: the probability that each step of a completion is right.

    prm = load_process_reward(config, tokenizer, aggregate="min")
    prm.steps(prompt_ids, completion_ids)       # for each completion where steps end, probabilities
    rewards = {"process": (prm, 1.0)}           # one number for each completion

recipes/prm.py trains one. Steps are what stands between two separators, that of its training data.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from posttrain.models.reward_model import PER_STEP, Scorer, load_reward_model
from posttrain.packed.scalar import SEPARATOR_FILE
from posttrain.run.engine import half_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.run.settings import ModelConfig

Aggregate = Literal["min", "product", "last"]
# From the probabilities of a completion's steps to one number. Lightman et al. (2305.20050) take
# the product, Wang et al. (2312.08935) the minimum, others the last step's.
AGGREGATES: dict[Aggregate, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "last": lambda probabilities: probabilities[-1],
}
REMEMBERED = 8192  # completions whose steps are known: a reward and an advantage both ask for them


class ProcessRewardModel(Scorer):
    """A reward (posttrain.rewards): the probabilities of a completion's steps, as one number.

    Args:
        separator: What ends a step; the last step ends with the completion.
        aggregate: A key of AGGREGATES.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        separator: str = "\n",
        aggregate: Aggregate = "min",
        half: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, half=half)
        self.separator, self.aggregate = separator, AGGREGATES[aggregate]
        self._known: dict[bytes, tuple[list[int], list[float]]] = {}
        self._text_of = lru_cache(None)(
            lambda token: tokenizer.decode([token], skip_special_tokens=True)
        )

    def __call__(
        self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]], **_: object
    ) -> list[float]:
        """Score completions by their token ids."""
        return [self.aggregate(values) for _, values in self.steps(prompt_ids, completion_ids)]

    def steps(
        self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]]
    ) -> list[tuple[list[int], list[float]]]:
        """Return for each completion the index of each step's last token, and its probability."""
        both = list(zip(prompt_ids, completion_ids, strict=True))
        keys = [_digest(*one) for one in both]
        if len(self._known) > REMEMBERED:
            self._known.clear()
        new = {key: one for key, one in zip(keys, both, strict=True) if key not in self._known}
        if new:
            prompts, completions = map(list, zip(*new.values(), strict=True))
            ends = [self.step_ends(completion) for completion in completions]
            found = self.scores(prompts, completions, ends)
            for key, places, logits in zip(new, ends, found, strict=True):
                self._known[key] = (places, torch.tensor(logits).sigmoid().tolist())
        return [self._known[key] for key in keys]

    def step_ends(self, completion: Sequence[int]) -> list[int]:
        """Find the index of each step's last token."""
        return step_ends(list(map(self._text_of, completion)), self.separator)


def step_ends(texts: Sequence[str], separator: str) -> list[int]:
    """Find the tokens that end a step, given the text of each token.

    These are the tokens in which a separator ends that has text before it, and the completion's
    last token, unless nothing follows the last separator but a token without text. By hand: "a",
    "\\n", "\\n", "b", "" gives 1 and 4, and "a", "\\n", "" gives 2.
    """
    ends, since = [], ""
    for index, text in enumerate(texts):
        since += text
        before, found, after = since.rpartition(separator)
        if found and before.strip():
            ends.append(index)
            since = after
    last = len(texts) - 1
    if since.strip() or not ends:
        return [*dict.fromkeys([*ends, last])]
    return [*ends[:-1], last]


def load_process_reward(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, aggregate: Aggregate = "min"
) -> ProcessRewardModel:
    """Load the process reward model that `config` names, to be used as it is."""
    model = load_reward_model(replace(config, use_peft=False), tokenizer, kind=PER_STEP, quiet=True)
    path, separator = Path(config.model_name_or_path) / SEPARATOR_FILE, "\n"
    if path.is_file():
        separator = json.loads(path.read_text(encoding="utf-8"))["separator"]
    half = half_dtype(config.dtype)
    return ProcessRewardModel(model, tokenizer, separator=separator, aggregate=aggregate, half=half)


def _digest(prompt: Sequence[int], completion: Sequence[int]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for ids in (prompt, completion):
        digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.digest()
