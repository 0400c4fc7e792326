"""Summarise rollouts, as metrics and as records of samples.jsonl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.rollouts.group import Rollout

if TYPE_CHECKING:
    from posttrain.rollouts.policies import MetricSink

# Verdicts that give no reward although the completion need not be wrong -> the metric of their
# share of completions.
WATCHED_VERDICTS = {
    "refused": "completions_refused",
    "timeout": "completions_timed_out",
    "our failure": "verifier_failed",
}


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
    metrics.add("mean_completion_tokens", sum(len(c.token_ids) for c in completions), number)
    metrics.add("truncated", sum(c.finish_reason == "length" for c in completions), number)
    metrics.add("unscored", rollout.scores.none, number)
    for kind, times in rollout.verdicts.items():
        if kind in WATCHED_VERDICTS:
            metrics.add(WATCHED_VERDICTS[kind], times, number)
    metrics.add("reward_failures", rollout.scores.errors + rollout.scores.timeouts)


def sample_record(rollout: Rollout, row: int, step: int) -> dict[str, Any]:
    """Make the record of one completion for samples.jsonl.

    Args:
        row: The completion's index among all P * G.
        step: The first optimizer step that learns from this rollout.
    """
    completion = rollout.flat[row]
    prompt = rollout.prompts[row // len(rollout.completions[0])]
    parts = {name: values[row] for name, values in rollout.scores.parts.items()}
    return {
        "step": step,
        "prompt": prompt["prompt"],
        "completion": rollout.texts[row],
        "reward": rollout.scores.totals[row],
        **parts,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
