"""A rollout leaves its metrics in the run folder, and a few of its completions as records.

note_completions(trainer.metrics, rollout)
for row, why in chosen_rows(rollout).items():
    append_log("runs/x/samples.jsonl", sample_record(rollout, row, step, tokenizer))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.rollouts.group import Rollout
    from posttrain.rollouts.policies import MetricSink
    from posttrain.rollouts.sampling import Completion

SAMPLES_PER_ROLLOUT = 2  # completions written to samples.jsonl each time a line is logged
EVALUATED_SAMPLES = 4  # and of the first held-out prompts, at each evaluation
MAX_TOKENS_OF_A_CHARACTER = 4  # bytes of UTF-8
SAMPLE_TOKENS = 512  # of longer ones only the ends are written token by token
# Verdicts without a reward that need not be the completion's fault -> the metric of their share.
WATCHED_VERDICTS = {
    "refused": "completions_refused",
    "timeout": "completions_timed_out",
    "our failure": "verifier_failed",
    "judge failed": "judge_failed",
}
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
LOOKED_AT = 64  # completions whose repetition is measured: enough to see it drift


def note_completions(metrics: MetricSink, rollout: Rollout) -> None:
    """Add a rollout's rewards and their parts, lengths and shares of special cases to metrics.

    Training and evaluation both use it, so their metrics have the same names.
    """
    scored = rollout.rewards[~rollout.rewards.isnan()]
    metrics.add("reward", scored.sum(), scored.numel())
    for name, (total, count) in rollout.scores.sums().items():
        metrics.add(name, total, count)
    completions = rollout.flat
    number = len(completions)
    lengths = sorted(len(c.token_ids) for c in completions)
    metrics.add("mean_completion_tokens", sum(lengths), number)
    for name, share in QUANTILES.items():
        length = lengths[int(share * (number - 1))]
        metrics.add(f"completion_tokens_{name}", length * number, number)
    repeated = [repeated_share(c.token_ids) for c in completions[:: -(-number // LOOKED_AT)]]
    metrics.add("repetition", sum(repeated), len(repeated))
    metrics.add("truncated", sum(c.finish_reason == "length" for c in completions), number)
    metrics.add("unscored", rollout.scores.none, number)
    for kind, times in rollout.verdicts.items():
        if kind in WATCHED_VERDICTS:
            metrics.add(WATCHED_VERDICTS[kind], times, number)
    metrics.add("reward_failures", rollout.scores.errors + rollout.scores.timeouts)


def repeated_share(ids: Sequence[int], size: int = 4) -> float:
    """Return the share of a completion's runs of `size` tokens that it holds more than once.

    By hand: 1 2 1 2 1 2 with size 2 has five runs, two of them different: 3/5.
    """
    runs = list(zip(*(ids[start:] for start in range(size)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def chosen_rows(rollout: Rollout) -> dict[int, str]:
    """Choose completions to show: the first ones, the best and the worst -> why each was chosen."""
    rows = dict.fromkeys(range(min(SAMPLES_PER_ROLLOUT, len(rollout.texts))), "first")
    rewards = rollout.rewards.flatten()
    if not rewards.isnan().all():
        rows.setdefault(int(rewards.nan_to_num(-torch.inf).argmax()), "best")
        rows.setdefault(int(rewards.nan_to_num(torch.inf).argmin()), "worst")
    return rows


def sample_record(
    rollout: Rollout, row: int, step: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Make the record of one completion for samples.jsonl.

    Args:
        row: The completion's index among all P * G.
        step: The first optimizer step that learns from this rollout.
    """
    completion, scores = rollout.flat[row], rollout.scores
    prompt = rollout.prompts[row // len(rollout.completions[0])]
    parts = {name: values[row] for name, values in scores.parts.items()}
    rules = {name: told[row] for name, told in scores.rules.items() if told[row]}
    return {
        "step": step,
        "prompt": prompt["prompt"],
        "completion": rollout.texts[row],
        "reward": scores.totals[row],
        **parts,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "parts": list(parts),
        "rules": rules,
        "token_logps": token_logps(completion, tokenizer),
    }


def token_logps(
    completion: Completion, tokenizer: PreTrainedTokenizerBase
) -> list[list[Any] | None]:
    """List `[text, log-prob in nats, number of tokens]` of a completion's tokens, stop token too.

    Tokens that make up one character only together are one entry, with the sum of their log-probs.
    A completion of more than `SAMPLE_TOKENS` has None in place of its middle.
    """
    ids, logps, found = completion.token_ids, completion.logps, []
    skipped = range(0)
    if len(ids) > SAMPLE_TOKENS:
        skipped = range(SAMPLE_TOKENS // 2, len(ids) - SAMPLE_TOKENS // 2)
    start = 0
    for end in range(1, len(ids) + 1):
        if end - 1 in skipped:
            found += [None] if end - 1 == skipped[0] else []
            start = end
            continue
        text = tokenizer.decode(ids[start:end])
        if text.endswith("\ufffd") and end - start < MAX_TOKENS_OF_A_CHARACTER and end < len(ids):
            continue
        found.append([text, round(sum(logps[start:end]), 3) + 0.0, end - start])  # no -0.0
        start = end
    return found
