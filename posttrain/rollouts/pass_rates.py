"""How often the starting model solves each prompt: Kimi k1.5's measure of difficulty.

Measured once, by drawing n answers to every prompt, and kept in a file that is named after all it
depends on: weights, data, reward and sampling. The paper draws 10 at a high temperature.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from posttrain.errors import ConfigError
from posttrain.rollouts.generator import ROWS_AT_ONCE
from posttrain.rollouts.group import Rollout, success_rates
from posttrain.rollouts.sampling import Sampling
from posttrain.run.console import is_main_process, say
from posttrain.run.files import write_whole
from posttrain.run.ranks import from_all_ranks, rank_and_world

PASS_RATE_POSITION = 2**42  # where the seeds of these answers begin, far from all others


def fingerprint(model: nn.Module, prompts: Any, sampling: Sampling, *other: Any) -> str:
    """SHA-256 over the weights, all columns of the prompts and everything else given."""
    digest = hashlib.sha256(repr((sampling, *other)).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.float().cpu().numpy().tobytes())
    for column in sorted(prompts.column_names):
        digest.update(json.dumps([column, list(prompts[column])], default=str).encode())
    return digest.hexdigest()


def with_pass_rates(prompts: Any, rates: Sequence[float | None] | None = None) -> Any:
    """The prompts with a column `pass_rate`; without rates all are unknown (None).

    Raises ConfigError where the data has such a column: it would be unclear which one counts.
    """
    if "pass_rate" in prompts.column_names:
        raise ConfigError(
            "--pass_rate_generations: expected data without a column 'pass_rate', for it is to be "
            "measured; found one. Leave the flag out to use it, or remove or rename the column."
        )
    return prompts.add_column("pass_rate", list(rates or [None] * len(prompts)))


def cached_pass_rates(path: Path, measure: Callable[[], list[float | None]]) -> list[float | None]:
    """What `path` holds, else what `measure` finds, written there; all ranks get the same."""
    is_kept = is_main_process() and path.is_file()
    found = from_all_ranks(json.loads(path.read_text()) if is_kept else None)[0]
    if found is not None:
        say(f"pass rates read from {path}")
        return found
    rates = measure()
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(rates))
    return rates


def measure_pass_rates(
    prompts: Any,
    roll_out: Callable[[list[dict], Sequence[int]], Rollout],
    *,
    reward: str,
    num_generations: int,
) -> list[float | None]:
    """For each prompt the mean of `reward`, cut to [0, 1], over its answers; None where it cannot
    be scored.

    roll_out: f(prompts, seeds) -> Rollout with `num_generations` answers. A collective: each
    rank takes its share.
    """
    rank, world = rank_and_world()
    say(f"pass rates of {len(prompts):,} prompts, {num_generations} answers to each, once")
    size = max(1, ROWS_AT_ONCE // num_generations)
    mine: dict[int, float | None] = {}
    for batch in range(math.ceil(len(prompts) / (size * world))):
        start = (batch * world + rank) * size
        rows = range(start, min(start + size, len(prompts)))
        # A rank without rows takes part where weights are gathered.
        asked = list(rows) or [0]
        rollout = roll_out([prompts[i] for i in asked], [PASS_RATE_POSITION + i for i in asked])
        mine.update(zip(rows, success_rates(rollout, reward), strict=False))
    found = {row: rate for share in from_all_ranks(mine) for row, rate in share.items()}
    return [found[row] for row in range(len(prompts))]
