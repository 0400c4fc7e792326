"""A reward model: loaded to be trained, or used as one of RL's rewards.

    model = load_reward_model(config, tokenizer)          # to train; config: a ModelConfig
    score = load_reward(config, tokenizer, centred_on=pairs)
    rewards = {"score": (score, 1.0)}                     # for RLTrainer or PPOTrainer

It starts from a causal LM, whose head is replaced, or from a saved sequence classifier with one
label; either may be a LoRA adapter. What is saved is such a classifier.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from posttrain.errors import ConfigError
from posttrain.models.load import (
    check_asked,
    describe_dtype,
    load_merged,
    load_model,
    load_tokenizer,
    load_whole,
    place_of,
)
from posttrain.models.lora import base_of, with_lora
from posttrain.packed.batch import pack_groups, split_by_tokens
from posttrain.packed.forward import tokens_at_once
from posttrain.packed.half import hold_in_half
from posttrain.packed.scalar import (
    ScalarHead,
    completion_positions,
    packed_scalars,
    prepare_scalar,
)
from posttrain.run.engine import half_dtype, is_sharded, this_device
from posttrain.run.options import say

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from posttrain.run.settings import ModelConfig

# Reference completions: the standard error of their mean score is below 5 % of the scores' own
# standard deviation.
CENTRED_ON = 512


class Scorer:
    """A model with a score head, used as it is, to score tokens of completions.

    It reads token ids, so nothing is tokenised again. half: the format that forwards run in by
    autocast, and linear layers are held in.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        half: torch.dtype | None = None,
        max_tokens_per_microbatch: int | None = None,
    ) -> None:
        self.model = model.to(this_device()).requires_grad_(False).eval()
        if half:
            hold_in_half(self.model, half)
        self.half = half
        self.max_tokens = max_tokens_per_microbatch or tokens_at_once(this_device())

    @torch.no_grad()
    def scores(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        ends: Sequence[Sequence[int]],
    ) -> list[list[float]]:
        """Score each completion at the tokens with these indices."""
        prompts, completions = list(prompts), list(completions)
        # Neighbours with the same prompt share its computation.
        groups = [list(g) for _, g in itertools.groupby(range(len(prompts)), prompts.__getitem__)]
        sizes = [len(prompts[g[0]]) + sum(len(completions[i]) for i in g) for g in groups]
        scores: list[list[float]] = [[] for _ in prompts]
        for part in filter(None, split_by_tokens(sizes, self.max_tokens)):
            rows = [row for index in part for row in groups[index]]
            batch = pack_groups(
                [prompts[groups[index][0]] for index in part],
                [[completions[row] for row in groups[index]] for index in part],
                device=self.model.device,
            )
            with torch.autocast(self.model.device.type, self.half, enabled=bool(self.half)):
                positions = completion_positions(batch, [ends[row] for row in rows])
                found = iter(packed_scalars(self.model, batch, positions).tolist())
            for row in rows:
                scores[row] = [next(found) for _ in ends[row]]
        return scores


class RewardModel(Scorer):
    """A reward (posttrain.rewards): the model's score of each completion at its last token.

    Only differences of scores mean anything; `centre` sets their level.
    """

    offset = 0.0

    def __call__(
        self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]], **_: object
    ) -> list[float]:
        """Score completions by their token ids, relative to the level that `centre` has set."""
        return [score - self.offset for score in self._last(prompt_ids, completion_ids)]

    def centre(self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]]) -> None:
        """Make scores relative to the mean score of these reference completions."""
        scores = self._last(prompt_ids, completion_ids)
        self.offset = sum(scores) / len(scores)

    def _last(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[float]:
        ends = [[len(completion) - 1] for completion in completions]
        return [score for (score,) in self.scores(prompts, completions, ends)]


def load_reward(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    centred_on: Dataset | None = None,
) -> RewardModel:
    """Load the reward model that `config` names, to be used as it is.

    centred_on: pairs (posttrain.data.load_pairs); the chosen completions of the first CENTRED_ON
    of them score 0 on average.
    """
    model = load_reward_model(replace(config, use_peft=False), tokenizer, quiet=True)
    reward = RewardModel(model, half=half_dtype(config.dtype))
    if centred_on is not None:
        pairs = centred_on.select(range(min(CENTRED_ON, len(centred_on))))
        reward.centre(pairs["prompt_ids"], pairs["chosen_ids"])
    return reward


class Kind(NamedTuple):
    """Names of a kind of scored model in transformers and PEFT.

    Attributes:
        suffix: How the names of its classes end.
        task_type: Its name in an adapter's config.
        what: Its name in messages.
    """

    suffix: str
    task_type: str
    what: str


PER_COMPLETION = Kind("ForSequenceClassification", "SEQ_CLS", "sequence classifier")
PER_STEP = Kind("ForTokenClassification", "TOKEN_CLS", "token classifier")


def load_reward_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Kind = PER_COMPLETION,
    quiet: bool = False,
) -> nn.Module:
    """Load a classifier with one label, ready for packed batches, with LoRA on request.

    A causal LM gets a new head, with weights sampled from `config.seed` (0 where it has none).
    Raises ConfigError where `tokenizer`, whose ids the model will read, is not the model's own.
    """
    name = config.model_name_or_path
    for setting, unset in (("quantization", "none"), ("router_aux_loss_coef", None)):
        if (value := getattr(config, setting)) != unset:
            raise ConfigError(f"--{setting}: a reward model does not take it; found {value}.")
    _check_tokenizer(name, tokenizer)
    check_asked(config)
    if _is_classifier(name, kind):
        model = _load_classifier(name, kind)
    else:
        causal = load_model(replace(config, use_peft=False), quiet=True)
        model = _with_new_head(causal, kind, seed=getattr(config, "seed", 0))
    device, half = this_device(), half_dtype(config.dtype)
    if not is_sharded():
        model.to(device)
    kernel = prepare_scalar(
        model, attn_implementation=config.attn_implementation, device=device, half=bool(half)
    )
    size = sum(parameter.numel() for parameter in model.parameters())
    if config.use_peft:
        model = with_lora(model, config, task_type=kind.task_type, trained_whole=("score",))
        if half and not is_sharded():
            hold_in_half(model, half)
    if not quiet:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lora = f", {trained / 1e6:,.2f}M of them trained (LoRA)" if config.use_peft else ""
        say(
            f"model   {name} with a score head: {size / 1e6:,.2f}M parameters{lora}; "
            f"{device.type}, {describe_dtype(half)}, {kernel} attention"
        )
    return model


def _with_new_head(causal: nn.Module, kind: Kind, *, seed: int) -> nn.Module:
    """Build the family's classifier around a causal LM's trunk.

    The head's weights are normal with variance 1 / (D + 1) (openai/lm-human-preferences).
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as OF_SEQUENCES
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING as OF_TOKENS

    config, classifiers = causal.config, OF_TOKENS if kind is PER_STEP else OF_SEQUENCES
    if type(config) not in classifiers:
        raise ConfigError(
            f"{type(causal).__name__} has no {kind.what} in transformers, and a reward "
            "model is saved as one. Use a model of another family, such as Llama or Qwen3."
        )
    config.num_labels = 1
    config.token_classification_bias = False  # a head of its own would be random when loaded
    with torch.device("meta"):
        model = classifiers[type(config)](config)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ConfigError(
            f"{type(model).__name__} has no layer called score, which is where a reward is read. "
            "Use a model of another family, such as Llama or Qwen3."
        )
    setattr(model, model.base_model_prefix, causal.base_model)
    embeddings = causal.get_input_embeddings().weight
    model.score = ScalarHead(embeddings.shape[1])
    generator = torch.Generator().manual_seed(seed)
    std = (model.score.in_features + 1) ** -0.5
    nn.init.normal_(model.score.weight, std=std, generator=generator)
    model.score.to(embeddings.device)
    return model.train(causal.training)


def _load_classifier(name: str, kind: Kind) -> nn.Module:
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # see load_model
    is_adapter = (Path(name) / "adapter_config.json").is_file()
    load = load_merged if is_adapter else load_whole
    if kind is PER_STEP:
        place, settings = place_of(base_of(name))
        config = AutoConfig.from_pretrained(place, num_labels=1, **settings)
        config.token_classification_bias = False  # which a base under an adapter knows nothing of
        return load(AutoModelForTokenClassification, name, dtype=torch.float32, config=config)
    return load(AutoModelForSequenceClassification, name, num_labels=1, dtype=torch.float32)


def _is_classifier(name: str, kind: Kind) -> bool:
    """True if the model that is saved there has a score head already, and of this kind."""
    from transformers import AutoConfig

    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file():
        said = json.loads(adapter.read_text(encoding="utf-8"))["task_type"]
    else:
        place, settings = place_of(name)
        said = " ".join(AutoConfig.from_pretrained(place, **settings).architectures or [])
    kinds = (PER_COMPLETION, PER_STEP)
    found = next((k for k in kinds if k.task_type == said or k.suffix in said), None)
    if found not in (None, kind):
        raise ConfigError(
            f"{name} is a {found.what}, and a {kind.what} is needed: a reward model scores whole "
            "completions (recipes/reward_model.py), a process reward model steps (recipes/prm.py)."
        )
    return found is kind


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    own = load_tokenizer(name)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{name} has another tokenizer ({len(own):,} tokens) than the completions that it "
            f"scores ({len(tokenizer):,} tokens), and token ids are passed on as they are. Train a "
            "reward model from the same family as the policy."
        )
