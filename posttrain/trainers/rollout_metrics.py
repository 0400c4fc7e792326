"""What a rollout's answers are worth, as metrics and as records of samples.jsonl."""

from posttrain.rollouts.rollout import Rollout
from posttrain.trainers.metrics import Metrics

# Kinds of verdicts that are worth 0 or nothing without being wrong: share of answers.
WATCHED_VERDICTS = {
    "refused": "answers_refused", "timeout": "answers_timed_out", "our failure": "verifier_failed",
}  # fmt: skip


def note_answers(metrics: Metrics, rollout: Rollout) -> None:
    """Reward and its parts, length, cut answers: of training and evaluation alike."""
    scored = rollout.rewards[~rollout.rewards.isnan()]
    metrics.add("reward", scored.sum(), scored.numel())
    for name, (total, count) in rollout.scores.sums().items():
        metrics.add(name, total, count)
    answers = rollout.answers
    lengths = sum(len(answer.token_ids) for answer in answers)
    cut = sum(answer.finish_reason == "length" for answer in answers)
    metrics.add("mean_answer_tokens", lengths, len(answers))
    metrics.add("truncated", cut, len(answers))
    metrics.add("unscored", rollout.scores.none, len(answers))
    for kind, number in rollout.verdicts.items():
        if kind in WATCHED_VERDICTS:
            metrics.add(WATCHED_VERDICTS[kind], number, len(answers))
    metrics.add("reward_failures", rollout.scores.errors + rollout.scores.timeouts)


def sample_record(rollout: Rollout, row: int, step: int) -> dict:
    """Of one answer; step: the first that learns from this rollout."""
    answer = rollout.answers[row]
    prompt = rollout.prompts[row // len(rollout.completions[0])]
    parts = {name: values[row] for name, values in rollout.scores.parts.items()}
    return {
        "step": step, "prompt": prompt["prompt"], "completion": rollout.texts[row],
        "reward": rollout.scores.totals[row], **parts, "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
    }  # fmt: skip
