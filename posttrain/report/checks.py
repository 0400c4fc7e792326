"""The health of a run: each check, whether it held, when, and what to do.

    for health in checks_of(run):
        print(health.status, health.name, health.text, health.when)

RL's checks are those that the run prints while it trains (posttrain.run.watch). The others here
read the metrics of any run, once. docs/troubleshooting.md has a heading for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from posttrain.report.model import Health
from posttrain.report.run import Run
from posttrain.run.watch import CHECKS, Watch, course

FEW = 4  # values: fewer show no trend
LOSS_UP = 1.05  # times the loss of the first quarter, in the last one
HELD_OUT_UP = 1.03  # times the lowest held-out loss
ALWAYS = 0.9  # share of log lines
SINKING = -5.0  # nats of a whole completion: more than noise, less than ruin


class Judgement(NamedTuple):
    """A check that reads a whole run; `says` returns a sentence where its condition holds."""

    status: str
    name: str
    says: Callable[[Run], str | None]


def checks_of(run: Run) -> list[Health]:
    """Do all checks that fit the run: those that held at the end, those that held, and the fine."""
    found = [_judged(judgement, run) for judgement in JUDGEMENTS]
    if course(run.lines, "reward_std_zero") or run.parts:
        found = _watched(run) + [h for h in found if h.name not in NOT_OF_RL]
    order = {"warning": 0, "note": 1, "fine": 2}
    return sorted(found, key=lambda health: (not health.holds, order[health.status]))


def anchor_of(name: str) -> str:
    """Return the id that a heading of this text gets in rendered Markdown."""
    return re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-")


def _watched(run: Run) -> list[Health]:
    """Read the run's lines again, as it was watched while it trained."""
    watch, texts = Watch(run.parts), {}
    held: dict[str, list[int]] = {check.name: [] for check in CHECKS}
    for line in run.lines:
        for finding in watch.read(line):
            texts[finding.name] = finding.text
        for name in watch.active:
            held[name].append(line["step"])
    return [
        Health(
            name=check.name,
            status=check.kind if held[check.name] else "fine",
            text=texts.get(check.name, ""),
            when=_when(held[check.name], len(run.lines)),
            anchor=anchor_of(check.name),
            holds=check.name in watch.active,
        )
        for check in CHECKS
    ]


def _when(steps: list[int], num_lines: int) -> str:
    if not steps:
        return ""
    where = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
    return f"{where}, on {len(steps)} of {num_lines} log lines"


def _judged(judgement: Judgement, run: Run) -> Health:
    text = judgement.says(run)
    return Health(
        name=judgement.name,
        status=judgement.status if text else "fine",
        text=text or "",
        when="over the whole run" if text else "",
        anchor=anchor_of(judgement.name),
        holds=text is not None,
    )


def rising_loss(run: Run) -> str | None:
    """Warn if the loss of the last quarter is above that of the first."""
    losses = course(run.lines, "loss")
    if len(losses) < FEW:
        return None
    first, last = (_mean(part) for part in _quarters(losses))
    if first <= 0 or last <= LOSS_UP * first:
        return None
    return (
        f"from {first:.3g} in the first quarter of the run to {last:.3g} in the last. Lower "
        "--learning_rate, or warm up longer (--warmup_steps)"
    )


def overfitting(run: Run) -> str | None:
    """Warn if the held-out loss ended above its lowest."""
    losses = course(run.evaluations, "eval_loss")
    if len(losses) < 3 or losses[-1] <= HELD_OUT_UP * min(losses) or min(losses) <= 0:
        return None
    return (
        f"held-out loss {losses[-1]:.3g} at the end, {min(losses):.3g} at its lowest: the data is "
        "learnt by heart. Train for fewer steps, or take more data"
    )


def always_clipped(run: Run) -> str | None:
    """Note that the gradient's norm exceeds its bound on nearly every line."""
    limit, norms = run.config.get("max_grad_norm") or 0.0, course(run.lines, "grad_norm")
    if not limit or len(norms) < FEW:
        return None
    share = sum(norm > limit for norm in norms) / len(norms)
    if share < ALWAYS:
        return None
    return (
        f"on {share:.0%} of the log lines the gradient's norm was above --max_grad_norm {limit:g}: "
        "the bound sets the size of a step. Raise it, or see whether the batch is small"
    )


def sinking_completions(run: Run) -> str | None:
    """Note that chosen completions get less likely, while the margin grows."""
    ratios, margins = course(run.lines, "chosen_log_ratio"), course(run.lines, "margin")
    if len(ratios) < FEW or len(margins) < FEW:
        return None
    if ratios[-1] > SINKING or ratios[-1] > ratios[0] or margins[-1] < margins[0]:
        return None
    return (
        f"they are {-ratios[-1]:.3g} nats less likely than at the start, while the margin grew to "
        f"{margins[-1]:.3g}. Raise --beta, lower --learning_rate, or take a loss that holds them "
        "up (--loss apo_zero)"
    )


def _quarters(values: list[float]) -> tuple[list[float], list[float]]:
    size = max(1, len(values) // 4)
    return values[:size], values[-size:]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


JUDGEMENTS = (
    Judgement("warning", "rising loss", rising_loss),
    Judgement("warning", "overfitting", overfitting),
    Judgement("note", "gradient always clipped", always_clipped),
    Judgement("note", "sinking completions", sinking_completions),
)
NOT_OF_RL = ("rising loss", "overfitting", "sinking completions")  # its loss tells no progress
