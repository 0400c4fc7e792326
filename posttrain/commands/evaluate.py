"""`posttrain evaluate`: a saved model's accuracy, format and length on held-out problems.

    posttrain evaluate runs/sft/model --dataset data/heldout.jsonl --template alpaca
    evaluate_model("runs/sft/model", "data/heldout.jsonl", rewards=…, template="alpaca", …)

The model is loaded fresh from disk, and completions are scored by the rewards that RL trains with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.run.options import option, parse, plain_errors, say
from posttrain.run.settings import ModelConfig

if TYPE_CHECKING:
    from posttrain.rollouts.group import Rollout

BATCH_SIZE = 256  # prompts that are completed at once


@dataclass(kw_only=True)
class Config:
    """Settings of one evaluation."""

    model: str = option(help="folder or Hub name of the model; also as the first argument")
    dataset: str = option("data/heldout.jsonl", "problems: file, folder or Hub name")
    template: str = option("r1_zero", "prompt format: r1_zero, alpaca, chat, plain, …")
    max_completion_length: int = option(512, "tokens of the longest completion", at_least=1)
    temperature: float = option(0.0, "sampling temperature; 0 is greedy", at_least=0)
    reward: str = option("math", "what accuracy is: math, code, exact, choice, FILE.py:FUNCTION")


def main(argv: Sequence[str]) -> None:
    """Print the means over all problems; the first argument without a flag is the model."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    config = parse(Config, argv)
    with plain_errors():
        found = evaluate_model(
            config.model,
            config.dataset,
            rewards=_rewards(config),
            template=config.template,
            max_tokens=config.max_completion_length,
            temperature=config.temperature,
        )
    for name, value in found.items():
        say(f"{name:24}{value:.1f}" if name.endswith("tokens") else f"{name:24}{value:.1%}")


def _rewards(config: Config) -> dict[str, tuple[Callable, float]]:
    from posttrain.rewards.checks import load_reward
    from posttrain.rewards.choice import choice_reward, exact_match_reward
    from posttrain.rewards.code import code_reward
    from posttrain.rewards.format import think_answer_format
    from posttrain.rewards.math import math_reward

    known = {
        "math": math_reward,
        "code": code_reward,
        "exact": exact_match_reward,
        "choice": choice_reward,
    }
    accuracy = load_reward(config.reward, known)
    return {"accuracy": (accuracy, 1.0), "format": (think_answer_format, 1.0)}


def evaluate_model(
    model_name_or_path: str,
    dataset: str | Sequence[dict],
    *,
    rewards: Mapping[str, tuple[Callable, float]],
    template: str,
    max_tokens: int,
    temperature: float = 0.0,
    split: str = "train",
) -> dict[str, float]:
    """Complete each prompt once; return the mean of each reward, and `mean_completion_tokens`.

    Args:
        dataset: a file, folder or Hub name, or rows (posttrain.data.load_prompts).
        rewards: {name: (function, weight)}, as RLTrainer takes them; weights do not matter here.
        max_tokens: of a completion; longer ones are cut, and scored as they are.
        temperature: 0 is greedy.
        split: of a Hub dataset or a folder.
    """
    from posttrain.data import load_prompts
    from posttrain.data.encode import num_ids, stop_ids_of
    from posttrain.models.load import load_for_inference, load_tokenizer
    from posttrain.rollouts.generator import HFGenerator
    from posttrain.rollouts.group import roll_out
    from posttrain.rollouts.sampling import Sampling

    tokenizer = load_tokenizer(model_name_or_path)
    model = load_for_inference(ModelConfig(model_name_or_path=model_name_or_path))
    prompts = load_prompts(dataset, tokenizer, template=template, split=split, say=lambda _: None)
    stop_ids = stop_ids_of(model_name_or_path, tokenizer)
    sampling = Sampling(max_tokens, stop_ids, temperature, vocabulary=num_ids(tokenizer))
    rollouts = []
    for start in range(0, len(prompts), BATCH_SIZE):
        rows = range(start, min(start + BATCH_SIZE, len(prompts)))
        rollouts.append(
            roll_out(
                HFGenerator(model),
                tokenizer,
                [prompts[i] for i in rows],
                rewards=rewards,
                sampling=sampling,
                num_generations=1,
                seeds=rows,
            )
        )
    return _summary(rollouts)


def _summary(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over all completions; a reward's mean leaves out those that could not be scored."""
    means = {}
    for name in rollouts[0].scores.parts:
        sums = [rollout.scores.sums()[name] for rollout in rollouts]
        means[name] = sum(total for total, _ in sums) / max(1, sum(count for _, count in sums))
    answers = [answer for rollout in rollouts for answer in rollout.flat]
    tokens = sum(len(answer.token_ids) for answer in answers)
    return {**means, "mean_completion_tokens": tokens / len(answers)}
