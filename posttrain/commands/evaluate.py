"""How well a saved model answers held-out prompts: loaded fresh from disk, scored by rewards.

evaluate_model("runs/sft/model", "data/heldout.jsonl", rewards=…, template="alpaca")
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.data import load_prompts
from posttrain.data.encode import Encoder
from posttrain.models.load import load_for_inference, load_tokenizer
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.group import Rollout, roll_out
from posttrain.rollouts.sampling import Sampling
from posttrain.run.settings import ModelConfig

BATCH_SIZE = 256  # prompts answered at once


def evaluate_model(
    model_name_or_path: str,
    dataset: Any,
    *,
    rewards: Mapping[str, tuple[Callable, float]],
    template: str,
    max_tokens: int,
    temperature: float = 0.0,
) -> dict[str, float]:
    """One answer to each prompt of `dataset`: the mean of each reward, and `mean_answer_tokens`.

    Greedy at temperature 0. max_tokens: of an answer; longer ones are cut, and scored as they are.
    """
    tokenizer = load_tokenizer(model_name_or_path)
    model = load_for_inference(ModelConfig(model_name_or_path=model_name_or_path))
    prompts = load_prompts(dataset, tokenizer, template=template, say=lambda _: None)
    sampling = Sampling(max_tokens, tuple(Encoder(tokenizer).end_ids), temperature)
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
    """Means over all answers; those that could not be scored are left out of a reward's mean."""
    means = {}
    for name in rollouts[0].scores.parts:
        sums = [rollout.scores.sums()[name] for rollout in rollouts]
        means[name] = sum(total for total, _ in sums) / max(1, sum(count for _, count in sums))
    answers = [answer for rollout in rollouts for answer in rollout.flat]
    tokens = sum(len(answer.token_ids) for answer in answers)
    return {**means, "mean_answer_tokens": tokens / len(answers)}
