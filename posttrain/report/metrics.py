"""The charts of a run: the metrics that share one, and a line on what they mean.

    charts = charts_of(run)      # any metric that a run logged is in one of them

A metric that the tables do not know has a chart of its own, under its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from posttrain.report.model import Chart, Series
from posttrain.report.run import Run

# Not metrics: where a line stands, and the Trainer's own summary.
POSITIONS = frozenset(("step", "epoch", "seconds", "warnings", "total_flos"))
LEARNING, COMPLETIONS, POLICY, OPTIMIZER, SPEED, OTHER = (
    *("Learning", "Completions", "Policy", "Optimizer"),
    *("Speed and memory", "Other metrics"),
)


class Picture(NamedTuple):
    """A chart of known metrics: name -> label of its line, the one that a lone line needs none."""

    key: str
    section: str
    title: str
    lines: Mapping[str, str]
    meaning: str
    is_share: bool = False


def _picture(key: str, section: str, title: str, meaning: str, **settings: Any) -> Picture:
    lines = settings.pop("lines", {key: title})
    return Picture(key, section, title, lines, meaning, **settings)


PICTURES = (
    _picture(
        "loss",
        LEARNING,
        "Loss",
        "What the optimizer lowers. In RL it hovers near 0 by design, and the reward tells the "
        "progress; elsewhere it should fall, held out too.",
    ),
    _picture(
        "token_accuracy",
        LEARNING,
        "Token accuracy",
        "Share of trained tokens that the model would have chosen itself.",
        is_share=True,
    ),
    _picture(
        "pair_accuracy",
        LEARNING,
        "Pair accuracy",
        "Share of pairs in which the chosen completion is preferred; 50 % is guessing.",
        is_share=True,
    ),
    _picture(
        "margin",
        LEARNING,
        "Margin",
        "By how much the chosen completion is ahead of the rejected one, in nats or in logits. It "
        "grows; without end, the model is overconfident.",
    ),
    _picture(
        "log_ratio",
        LEARNING,
        "Log-ratios to the reference",
        "How much likelier than at the start each completion is, in nats. Chosen far below 0 means "
        "that both sink, and only their difference is learnt.",
        lines={"chosen_log_ratio": "chosen", "rejected_log_ratio": "rejected"},
    ),
    _picture(
        "pair_logps",
        LEARNING,
        "Log-probs of pairs",
        "Log-prob of whole completions, in nats.",
        lines={"chosen_logps": "chosen", "rejected_logps": "rejected"},
    ),
    _picture(
        "pair_tokens",
        COMPLETIONS,
        "Length of pairs",
        "Mean tokens of the completions; where the chosen ones are longer, length is learnt too.",
        lines={"chosen_tokens": "chosen", "rejected_tokens": "rejected"},
    ),
    _picture(
        "pair_rewards",
        LEARNING,
        "Scores of pairs",
        "The reward model's scores, in logits; only differences mean anything.",
        lines={"chosen_reward": "chosen", "rejected_reward": "rejected"},
    ),
    _picture(
        "length",
        COMPLETIONS,
        "Completion length",
        "Tokens of a completion: the mean, and what a tenth, a half and nine tenths stay below. "
        "R1-Zero's grew as it learned to reason (figure 3 of its paper).",
        lines={
            "mean_completion_tokens": "mean",
            "completion_tokens_p10": "10 %",
            "completion_tokens_p50": "median",
            "completion_tokens_p90": "90 %",
        },
    ),
    _picture(
        "truncated",
        COMPLETIONS,
        "Truncated completions",
        "Share of completions that reached the length limit and do not end.",
        is_share=True,
    ),
    _picture(
        "repetition",
        COMPLETIONS,
        "Repetition",
        "Share of a completion's runs of four tokens that it holds more than once; a rise is a "
        "policy that loops.",
        is_share=True,
    ),
    _picture(
        "reward_failures",
        COMPLETIONS,
        "Reward failures",
        "Calls of rewards that raised an error or ran out of time, a rollout.",
    ),
    _picture(
        "unscored",
        COMPLETIONS,
        "Completions without a reward",
        "Share of completions that no reward could judge; they do not train.",
        is_share=True,
    ),
    _picture(
        "reward_std_zero",
        COMPLETIONS,
        "Groups that teach nothing",
        "Share of prompts whose completions all got the same reward (standard deviation zero).",
        is_share=True,
    ),
    _picture(
        "kl",
        POLICY,
        "KL to the reference",
        "How far the policy has moved from its start, in nats a token. A jump is a warning.",
    ),
    _picture(
        "kl_per_completion",
        POLICY,
        "KL of a completion",
        "How far the policy has moved from its start, in nats a completion.",
    ),
    _picture(
        "entropy",
        POLICY,
        "Entropy",
        "How open the choice of the next token is, in nats. It falls as the policy gets sure; near "
        "0 it has stopped to explore.",
    ),
    _picture(
        "clip_share",
        POLICY,
        "Clipped tokens",
        "Share of tokens whose gradient the clip took away; above a fifth, steps are too large.",
        is_share=True,
    ),
    _picture(
        "ratio_outside",
        POLICY,
        "Ratio at the first update",
        "Share of tokens whose probability differs by a tenth between sampling and training, "
        "before any update: 0, or the two disagree.",
        is_share=True,
    ),
    _picture(
        "sampler_gap",
        POLICY,
        "Gap between sampler and trainer",
        "Mean difference of log-probs at sampling and at training, in nats a token.",
    ),
    _picture(
        "correction",
        POLICY,
        "Importance-sampling weight",
        "Mean weight of a token; near 1, or the sampler is another policy.",
    ),
    _picture(
        "grad_norm",
        OPTIMIZER,
        "Gradient norm",
        "Before clipping. Steady is good; spikes go with extreme rows or a high learning rate.",
    ),
    _picture(
        "learning_rate",
        OPTIMIZER,
        "Learning rate",
        "How large the steps are: it rises over the warm-up and follows the schedule.",
    ),
    _picture(
        "tokens_per_second",
        SPEED,
        "Throughput",
        "Tokens trained on a second, all processes, generation included.",
    ),
    _picture(
        "time_split",
        SPEED,
        "Where the time goes",
        "Seconds: generating and scoring a rollout, waiting for one, and training one step.",
        lines={
            "seconds_generate": "generate",
            "seconds_reward": "reward",
            "seconds_wait": "wait",
            "seconds_train": "train",
        },
    ),
    _picture(
        "peak_memory_gb",
        SPEED,
        "Peak memory",
        "Gigabytes that the main process has held at most: of its GPU, else of the machine.",
    ),
)


def charts_of(run: Run) -> list[Chart]:
    """Make a chart of every metric of the run; the rewards and their parts share one."""
    names = _names(run.lines)
    charts = _of_rewards(run)
    taken = {s.name for chart in charts for s in chart.series}
    for picture in PICTURES:
        of_both = picture.section == LEARNING
        series = _both(run, picture.lines) if of_both else _training(run, picture.lines)
        if series and not {s.name for s in series} <= taken:
            taken |= {s.name for s in series}
            charts.append(
                Chart(
                    picture.key,
                    picture.title,
                    picture.meaning,
                    series,
                    picture.section,
                    picture.is_share,
                )
            )
    held_out = {name.removeprefix("eval_") for name in _names(run.evaluations)}
    for name in sorted((set(names) | held_out) - taken - {t.removeprefix("eval_") for t in taken}):
        series = _both(run, {name: name})
        meaning = "Logged by this run's trainer, under this name."
        charts += [Chart(key_of(name), name, meaning, series, OTHER)] if series else []
    order = (LEARNING, COMPLETIONS, POLICY, OPTIMIZER, SPEED, OTHER)
    return sorted(charts, key=lambda chart: order.index(chart.section))


def key_of(name: str) -> str:
    """Make a name that can be an element's id."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def _of_rewards(run: Run) -> list[Chart]:
    """The reward with its parts, and the main part in training and held out."""
    if not run.parts:
        series = _both(run, {"reward": "reward"})
        meaning = "Mean reward."
        return [Chart("reward", "Reward", meaning, series, LEARNING)] if series else []
    main, *_ = run.parts
    weights = run.environment.get("rewards", {})
    labels = {p: f"{p} (weight {weights[p]:g})" if p in weights else p for p in run.parts}
    of_parts = _training(run, {"reward": "total", **labels})
    meaning = "Mean over completions of the reward that trains, and of its parts before weighting."
    series = _both(run, {main: main})
    shares = all(0 <= value <= 1 for s in series for value in s.values)
    charts = []
    if series:
        charts.append(
            Chart(
                "main_reward",
                main.capitalize(),
                f"The reward that counts, {main}: completions sampled in training, and greedy ones "
                "of held-out prompts where the run evaluated.",
                series,
                LEARNING,
                shares,
            )
        )
    return [*charts, Chart("reward", "Reward and its parts", meaning, of_parts, LEARNING)]


def _training(run: Run, labels: Mapping[str, str]) -> list[Series]:
    made = [series_of(run.lines, name, label) for name, label in labels.items()]
    return [series for series in made if series.steps]


def _both(run: Run, labels: Mapping[str, str]) -> list[Series]:
    """The metrics in training and, as dots, held out."""
    held_out = [
        series_of(run.evaluations, f"eval_{name}", f"{label}, held out", is_dots=True)
        for name, label in labels.items()
    ]
    return _training(run, labels) + [series for series in held_out if series.steps]


def series_of(
    lines: Sequence[Mapping[str, Any]], name: str, label: str, *, is_dots: bool = False
) -> Series:
    """Collect a metric's finite numbers; of several lines of a step the last counts."""
    found = {line["step"]: line[name] for line in lines if _is_finite(line.get(name))}
    return Series(name, label, list(found), list(found.values()), is_dots)


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of metrics, in the order in which they were logged."""
    names = dict.fromkeys(name for line in lines for name in line)
    return [n for n in names if n not in POSITIONS and not n.startswith("train_")]
