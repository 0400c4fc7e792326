"""Rewards of recipes/r1.py: rules for problems, a reward model and harmlessness for the rest.

    rewards = reasoning_rewards(config)                    # accuracy + format + language
    rewards = scenario_rewards(config, summary_reward)     # and preference + harmlessness

The reward model sees the final answer alone, so that it does not shape the reasoning; harmlessness
is judged on the whole output (arXiv 2501.12948, section 2.3.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from common import Rewards, accuracy_reward

from posttrain.rewards.checks import load_reward
from posttrain.rewards.format import think_answer_format
from posttrain.rewards.language import language_reward
from posttrain.rewards.pieces import Reward, Values, accepted
from posttrain.rewards.scenarios import avoids_words, reward_where, think_answer_or_plain
from posttrain.rewards.text import Completion, completion_text, final_text

if TYPE_CHECKING:
    from r1 import Config
    from transformers import PreTrainedTokenizerBase, TrainerState

    from posttrain.models.reward_model import RewardModel

KIND, REASONING, GENERAL = "kind", "reasoning", "general"  # the column of the last stage's data
FORMAT_WEIGHT = 0.2


def reasoning_rewards(config: Config) -> Rewards:
    """Accuracy, format, and the share of the reasoning's words in the language, summed."""
    return {
        "accuracy": (accuracy_reward(config.reward, config.output_dir), 1.0),
        "format": (think_answer_format, FORMAT_WEIGHT),
        "language": (in_language(config), config.language_weight),
    }


def scenario_rewards(config: Config, preference: SummaryReward) -> Rewards:
    """Rules for reasoning prompts; preference and harmlessness for general ones.

    Format and language count for all; a general answer may do without a thought.
    """
    on_problems = partial(reward_where, column=KIND, value=REASONING)
    on_general = partial(reward_where, column=KIND, value=GENERAL)
    start, harmless_weight = config.preference_from_step, config.harmless_weight
    return {
        "accuracy": (
            partial(on_problems, reward=accuracy_reward(config.reward, config.output_dir)),
            1.0,
        ),
        "format_problems": (partial(on_problems, reward=think_answer_format), FORMAT_WEIGHT),
        "format_general": (partial(on_general, reward=think_answer_or_plain), FORMAT_WEIGHT),
        "language": (in_language(config), config.language_weight),
        "preference": (Later(preference, start), config.preference_weight),
        "harmless": (Later(partial(on_general, reward=harmless(config)), start), harmless_weight),
    }


def in_language(config: Config) -> Reward:
    """The language reward, 0 for reasoning without a word: else silence would be no fault."""
    return partial(_zero_for_none, reward=language_reward(config.language, among=config.among))


def _zero_for_none(
    completions: Sequence[Completion], *, reward: Reward, **columns: object
) -> list[float]:
    return [score or 0.0 for score in reward(completions=completions, **columns)]


def harmless(config: Config) -> Reward:
    """The harmlessness reward that the settings name, on the whole output."""
    return load_reward(
        config.harmless, {"words": partial(avoids_words, words=config.harmful_words)}
    )


def final_answer_matches(
    completions: Sequence[Completion], *, answer: Sequence[object], **_columns: object
) -> list[float]:
    """Score 1.0 where the final answer is the column `answer` up to white space, else 0.0."""
    finals = [final_text(completion_text(completion)) for completion in completions]
    return [
        float(not final.problem and final.text.split() == str(wanted).split())
        for final, wanted in zip(finals, answer, strict=True)
    ]


class Later:
    """A reward that is 0 for all before optimizer step `from_step`, and then another reward."""

    def __init__(self, reward: Reward, from_step: int) -> None:
        self.reward, self.from_step = reward, from_step

    def __call__(
        self,
        completions: Sequence[Completion],
        *,
        trainer_state: TrainerState | None = None,
        **columns: object,
    ) -> Values:
        """Call the reward with what it asks for, once its time has come."""
        if trainer_state is not None and trainer_state.global_step < self.from_step:
            return [0.0] * len(completions)
        return self.reward(**accepted(self.reward, {"completions": completions, **columns}))


class SummaryReward:
    """A reward: the probability, by a reward model, that the final answer beats an average one.

    The score s of the final answer alone, relative to the chosen answers of the model's pairs, as
    1 / (1 + exp(-s)): between 0 and 1, as the rules' rewards that it is added to. It is 0 on
    reasoning prompts and without a final answer.
    """

    def __init__(self, model: RewardModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(
        self,
        completions: Sequence[Completion],
        *,
        prompt_ids: Sequence[list[int]],
        kind: Sequence[str],
    ) -> list[float]:
        """Score final answers; `prompt_ids` and `kind` are columns of the data."""
        scores = [0.0] * len(completions)
        finals = [final_text(completion_text(completion)) for completion in completions]
        judged = zip(kind, finals, strict=True)
        rows = [row for row, (k, final) in enumerate(judged) if k == GENERAL and final.text.strip()]
        if not rows:
            return scores
        texts = [finals[row].text.strip() for row in rows]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ended = [[*tokens, self.tokenizer.eos_token_id] for tokens in ids]
        found = self.model(prompt_ids=[prompt_ids[row] for row in rows], completion_ids=ended)
        for row, score in zip(rows, found, strict=True):
            scores[row] = 1 / (1 + math.exp(-max(-60.0, min(60.0, score))))
        return scores
